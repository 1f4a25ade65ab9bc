"""Hang detector: finds agents whose lease beats have stopped and that do not answer at `/health`.

Such an agent is lost, and its job may have ended; it hangs if its job still runs after HUNG_BEATS intervals. A node
that does not even refuse a connection is off or cut off, long before Slurm marks it down: its agents count as hanging
after UNREACHABLE_BEATS. One sign alone is not enough: a stalled file system stops beats, and a busy node answers late.
Beats are timed by this process's own clock, so an observer needs some intervals before it finds anything.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.net.protocol import HEALTH
from hpc_router.state.registry import Record

LOST_BEATS: Final = 2
UNREACHABLE_BEATS: Final = 3
HUNG_BEATS: Final = 8
"""In lease intervals without a new beat."""
CONNECT_S: Final = 1.0
"""Time limit for a connection to a node that did not answer."""


class SilentReplicas(NamedTuple):
    """Replicas without beat and answer: `lost` after LOST_BEATS, `hung` (a subset of `lost`) after HUNG_BEATS, or after
    UNREACHABLE_BEATS if their node cannot be reached."""

    lost: set[str]
    hung: set[str]


class _Beat(NamedTuple):
    beat: tuple[int | None, str | None]
    seen_at: float


class HangDetector:
    """Remembers when each replica's beat last changed."""

    def __init__(self) -> None:
        self._beats: dict[str, _Beat] = {}

    def silent(self, records: Sequence[Record], *, read_at: float) -> SilentReplicas:
        """Calls `/health` of replicas whose beats have stopped, for three seconds at most. `read_at`: monotonic time at
        which the records were read."""
        self._beats = {record.replica: self._beat(record, read_at) for record in records}
        beats = {
            record.replica: (read_at - self._beats[record.replica].seen_at) / record.beat_s
            for record in records
            if record.beat_s is not None
        }
        late = [record for record in records if beats.get(record.replica, 0.0) >= LOST_BEATS]
        lost = asyncio.run(_unanswering(late)) if late else {}
        limits = {replica: HUNG_BEATS if reachable else UNREACHABLE_BEATS for replica, reachable in lost.items()}
        return SilentReplicas(set(lost), {replica for replica in lost if beats[replica] >= limits[replica]})

    def _beat(self, record: Record, now: float) -> _Beat:
        before, beat = self._beats.get(record.replica), (record.beat, record.nonce)
        return before if before is not None and before.beat == beat else _Beat(beat, now)


async def _unanswering(records: Sequence[Record]) -> dict[str, bool]:
    """The replicas that do not answer at `/health`, and whether their node can be reached."""
    async with session() as client:

        async def answers(record: Record) -> bool:
            try:
                response = await call(client, "GET", record.url + HEALTH)
            except Unreachable:
                return False
            return isinstance(response.body, dict) and response.body.get("replica") == record.replica

        answered = await asyncio.gather(*(answers(record) for record in records))
    silent = [record for record, answers_now in zip(records, answered, strict=True) if not answers_now]
    reachable = await asyncio.gather(*(_is_reachable(record.url) for record in silent))
    return {record.replica: reached for record, reached in zip(silent, reachable, strict=True)}


async def _is_reachable(url: str) -> bool:
    """Whether the node accepts or refuses a connection."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    writer.close()
    return True
