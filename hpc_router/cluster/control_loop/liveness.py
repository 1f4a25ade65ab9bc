"""Which agents are lost or hang: their beats have stopped by our own clock, and nothing answers at `/health`.

Slurm may know the end of one that is lost; one whose job still runs after HUNG_BEATS hangs. Either sign alone condemns
nobody: a file system that stalls stops beats, and a busy node may answer late. An observer that
has just begun to look knows no beats and judges nobody.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.net.protocol import HEALTH
from hpc_router.state.registry import Record

LOST_BEATS: Final = 2
HUNG_BEATS: Final = 8
"""Intervals without a new beat."""


class SilentReplicas(NamedTuple):
    """Replicas whose beats have stopped and that do not answer; `hung` are those of `lost` that did so for long."""

    lost: set[str]
    hung: set[str]


class _Beat(NamedTuple):
    beat: tuple[int | None, str | None]
    seen_at: float


class HangDetector:
    """Fed with every look's records."""

    def __init__(self) -> None:
        self._beats: dict[str, _Beat] = {}

    def silent(self, records: Sequence[Record], *, read_at: float) -> SilentReplicas:
        """Takes two seconds at most, and only where beats have stopped. `read_at`: the monotonic time at which the
        records were read; later than that they say nothing."""
        self._beats = {record.replica: self._beat(record, read_at) for record in records}
        beats = {
            record.replica: (read_at - self._beats[record.replica].seen_at) / record.beat_s
            for record in records
            if record.beat_s is not None
        }
        late = [record for record in records if beats.get(record.replica, 0.0) >= LOST_BEATS]
        lost = asyncio.run(_unanswering(late)) if late else set()
        return SilentReplicas(lost, {replica for replica in lost if beats[replica] >= HUNG_BEATS})

    def _beat(self, record: Record, now: float) -> _Beat:
        before, beat = self._beats.get(record.replica), (record.beat, record.nonce)
        return before if before is not None and before.beat == beat else _Beat(beat, now)


async def _unanswering(records: Sequence[Record]) -> set[str]:
    async with session() as client:

        async def answers(record: Record) -> bool:
            try:
                answer = await call(client, "GET", record.url + HEALTH)
            except Unreachable:
                return False
            return isinstance(answer.body, dict) and answer.body.get("replica") == record.replica

        answered = await asyncio.gather(*(answers(record) for record in records))
    return {record.replica for record, heard in zip(records, answered, strict=True) if not heard}
