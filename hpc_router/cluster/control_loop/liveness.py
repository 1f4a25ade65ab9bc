"""Hang detector: finds agents whose lease beats have stopped and that do not answer at `/health`.

Such an agent is lost, and its job may have ended. The agent hangs if its job still runs after HUNG_BEATS intervals, or
at once if its node is off. A node is off if it neither accepts nor refuses a connection, even at a port that nobody
uses (the agent's own port may have a full queue of connections). Slurm marks such a node down much later. Neither sign
is enough alone, because a stalled file system stops beats and a busy node answers late. This process measures the time
since the last beat with its own clock, so it finds no lost agent in its first intervals.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.net.protocol import HEALTH
from hpc_router.state.registry import Record

LOST_BEATS: Final = 2
"""Number of lease intervals without a new beat after which an agent may be lost."""
HUNG_BEATS: Final = 8
"""Number of lease intervals without a new beat after which a lost agent hangs."""
UNUSED_PORT: Final = 1
"""A port on which no service is expected: a node that runs refuses a connection to it."""
CONNECT_S: Final = 2.0
"""Time limit for a connection to a node in seconds, long enough for a lost packet to be sent again."""


class SilentReplicas(NamedTuple):
    """The replicas whose beats have stopped and that do not answer. `lost`: all of them, silent for at least LOST_BEATS
    intervals. `hung`, a subset of `lost`: silent for at least HUNG_BEATS intervals, or with a node that is off. `off`,
    a subset of `hung`: with a node that is off."""

    lost: set[str]
    hung: set[str]
    off: set[str]


class _Beat(NamedTuple):
    """The last beat of a replica, and the monotonic time at which it was first seen."""

    beat: tuple[int | None, str | None]
    seen_at: float


class HangDetector:
    """Finds silent replicas. Remembers when each replica's beat last changed."""

    def __init__(self) -> None:
        self._beats: dict[str, _Beat] = {}

    def silent(self, records: Sequence[Record], *, read_at: float) -> SilentReplicas:
        """Returns the silent replicas. Calls `/health` of replicas whose beats have stopped, which takes at most four
        seconds. `read_at`: monotonic time at which the records were read."""
        self._beats = {record.replica: self._beat(record, read_at) for record in records}
        beats = {
            record.replica: (read_at - self._beats[record.replica].seen_at) / record.beat_s
            for record in records
            if record.beat_s is not None
        }
        late = [record for record in records if beats.get(record.replica, 0.0) >= LOST_BEATS]
        lost = asyncio.run(_unanswering(late)) if late else {}
        off = {name for name, reachable in lost.items() if not reachable}
        hung = off | {name for name in lost if beats[name] >= HUNG_BEATS}
        return SilentReplicas(set(lost), hung, off)

    def _beat(self, record: Record, now: float) -> _Beat:
        before, beat = self._beats.get(record.replica), (record.beat, record.nonce)
        return before if before is not None and before.beat == beat else _Beat(beat, now)


async def _unanswering(records: Sequence[Record]) -> dict[str, bool]:
    """Returns the replicas in `records` that do not answer at `/health`, each with whether its node can be reached."""
    async with session() as client:

        async def answers(record: Record) -> bool:
            try:
                response = await call(client, "GET", record.url + HEALTH, certificate=record.certificate)
            except Unreachable:
                return False
            return isinstance(response.body, dict) and response.body.get("replica") == record.replica

        reachable = await asyncio.gather(*(_is_reachable(record.url) for record in records))
        reached = [record for record, connects in zip(records, reachable, strict=True) if connects]
        answered = await asyncio.gather(*(answers(record) for record in reached))
    silent = {record.replica: True for record, answer in zip(reached, answered, strict=True) if not answer}
    return silent | {r.replica: False for r, connects in zip(records, reachable, strict=True) if not connects}


async def _is_reachable(url: str) -> bool:
    """Returns True if the host of `url` accepts or refuses a connection, and False if it does neither within
    CONNECT_S."""
    parts = urlsplit(url)
    return any(await asyncio.gather(*(_connects(parts.hostname, port) for port in (parts.port, UNUSED_PORT))))


async def _connects(host: str | None, port: int | None) -> bool:
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    writer.close()
    return True
