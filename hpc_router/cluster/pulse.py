"""Which agents hang: their process lives, their beats have stopped by our own clock, and nobody answers at `/health`.

Either alone condemns nobody: a file system that stalls stops beats, and a busy node may answer late. An observer that
has just begun to look knows no beats and judges nobody.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from hpc_router.cluster.http import Unreachable, call, session
from hpc_router.registry import Record
from hpc_router.wire import HEALTH

HUNG_BEATS: Final = 8
"""Intervals without a new beat."""


class _Beat(NamedTuple):
    beat: tuple[int | None, str | None]
    seen_at: float


class Pulse:
    """Fed with every look's records."""

    def __init__(self) -> None:
        self._beats: dict[str, _Beat] = {}

    def hung(self, records: Sequence[Record], *, read_at: float) -> set[str]:
        """The replicas that hang; two seconds at most, and only where beats have stopped. `read_at`: the monotonic
        time at which the records were read; later than that they say nothing."""
        self._beats = {record.replica: self._beat(record, read_at) for record in records}
        silent = [
            record
            for record in records
            if record.beat_s is not None and read_at - self._beats[record.replica].seen_at >= HUNG_BEATS * record.beat_s
        ]
        return asyncio.run(_unanswering(silent)) if silent else set()

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
