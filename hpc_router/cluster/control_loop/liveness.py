"""Hang detector: finds agents whose lease beats have stopped and that do not answer at `/health`.

Such an agent is lost, and its job may have ended. It hangs if its job still runs after HUNG_BEATS intervals. One of the
two signs alone is not enough: a stalled file system stops beats, and a busy node answers late. This process times beats
by its own clock, so it needs some intervals before it finds anything.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.net.protocol import HEALTH
from hpc_router.state.registry import Record

LOST_BEATS: Final = 2
HUNG_BEATS: Final = 8
"""Lease intervals without a beat after which an agent counts as hung."""


class SilentReplicas(NamedTuple):
    """Replicas that send no beat and do not answer: `lost` after LOST_BEATS intervals, `hung` after HUNG_BEATS (a
    subset of `lost`)."""

    lost: set[str]
    hung: set[str]


class _Beat(NamedTuple):
    beat: tuple[int | None, str | None]
    seen_at: float


class HangDetector:
    """Finds silent replicas. Remembers when each replica's beat last changed."""

    def __init__(self) -> None:
        self._beats: dict[str, _Beat] = {}

    def silent(self, records: Sequence[Record], *, read_at: float) -> SilentReplicas:
        """Returns the silent replicas. Calls `/health` of those whose beats have stopped, for two seconds at most.
        `read_at`: monotonic time at which the records were read."""
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
                response = await call(client, "GET", record.url + HEALTH)
            except Unreachable:
                return False
            return isinstance(response.body, dict) and response.body.get("replica") == record.replica

        answered = await asyncio.gather(*(answers(record) for record in records))
    return {record.replica for record, answers_now in zip(records, answered, strict=True) if not answers_now}
