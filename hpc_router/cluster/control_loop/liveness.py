"""Hang detector: finds agents whose lease beats have stopped and that do not answer at `/health`.

Such an agent is lost, and its job may have ended. The agent hangs if its job still runs after HUNG_BEATS intervals, or
at once if its node is off. A node is off if it neither accepts nor refuses a connection, even at a port that nobody
uses (the agent's own port may have a full queue of connections). Slurm marks such a node down much later. Neither sign
is enough alone, because a stalled file system stops beats and a busy node answers late. This process measures the time
since the last beat with its own clock, so it finds no lost agent in its first intervals.

An agent whose port refuses connections is gone: it listens until it ends, and only the kernel of its node, which runs,
refuses. A lost packet, a full queue and a frozen process refuse nothing. A firewall may, so a refusal counts only if
that port has accepted a connection of this process before, if a second attempt is refused too, and if a beat is late.
"""

import asyncio
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.net.protocol import HEALTH
from hpc_router.state.registry import Record, State

LATE_BEATS: Final = 1
"""Number of lease intervals without a new beat after which an agent's port is tried."""
LOST_BEATS: Final = 2
"""Number of lease intervals without a new beat after which an agent may be lost."""
HUNG_BEATS: Final = 8
"""Number of lease intervals without a new beat after which a lost agent hangs."""
UNUSED_PORT: Final = 1
"""A port on which no service is expected: a node that runs refuses a connection to it."""
CONNECT_S: Final = 2.0
"""Time limit for a connection to a node in seconds, long enough for a lost packet to be sent again."""
REFUSE_S: Final = 0.5
"""Time limit for a connection in seconds where only its acceptance or refusal matters, which a node sends at once."""
CONFIRM_S: Final = 0.25
"""Time in seconds between two attempts to connect to a port that refuses connections."""


class SilentReplicas(NamedTuple):
    """The replicas whose beats have stopped and that do not answer. `lost`: all of them, silent for at least LOST_BEATS
    intervals, or gone. `hung`, a subset of `lost`: silent for at least HUNG_BEATS intervals, gone, or with a node that
    is off. `off`, a subset of `hung`: with a node that is off. `gone`, a subset of `hung`: silent for at least
    LATE_BEATS intervals, with a port that refuses connections."""

    lost: set[str]
    hung: set[str]
    off: set[str]
    gone: set[str]


class _Beat(NamedTuple):
    """The last beat of a replica, and the monotonic time at which it was first seen."""

    beat: tuple[int | None, str | None]
    seen_at: float


class HangDetector:
    """Finds silent replicas. Remembers when each replica's beat last changed, and which URLs accepted a connection."""

    def __init__(self) -> None:
        self._beats: dict[str, _Beat] = {}
        self._accepted: set[str] = set()

    def silent(self, records: Sequence[Record], *, read_at: float) -> SilentReplicas:
        """Returns the silent replicas. Connects to replicas when it sees them first and when a beat is late, and calls
        `/health` of replicas whose beats have stopped, which takes at most four seconds. `read_at`: monotonic time at
        which the records were read."""
        known, self._beats = self._beats, {record.replica: self._beat(record, read_at) for record in records}
        self._accepted &= {record.url for record in records}
        beating = [record for record in records if record.beat_s is not None]
        beats = {r.replica: (read_at - self._beats[r.replica].seen_at) / (r.beat_s or 1.0) for r in beating}
        new = [record for record in beating if record.replica not in known]
        late = [record for record in beating if beats[record.replica] >= LATE_BEATS]
        if not new and not late:
            return SilentReplicas(set(), set(), set(), set())
        refusable = [r for r in late if r.url in self._accepted and r.state is not State.DRAINING]
        stopped = [record for record in late if beats[record.replica] >= LOST_BEATS]
        accepted, gone, unanswering = asyncio.run(_contact(new, refusable, stopped))
        self._accepted |= accepted
        off = {name for name, reachable in unanswering.items() if not reachable}
        hung = off | gone | {name for name in unanswering if beats[name] >= HUNG_BEATS}
        return SilentReplicas(gone | set(unanswering), hung, off, gone)

    def _beat(self, record: Record, now: float) -> _Beat:
        before, beat = self._beats.get(record.replica), (record.beat, record.nonce)
        return before if before is not None and before.beat == beat else _Beat(beat, now)


async def _contact(
    new: Sequence[Record], refusable: Sequence[Record], stopped: Sequence[Record]
) -> tuple[set[str], set[str], dict[str, bool]]:
    """Returns, all at once, `_accepting(new)`, `_refusing(refusable)` and `_unanswering(stopped)`."""
    return await asyncio.gather(_accepting(new), _refusing(refusable), _unanswering(stopped))


async def _accepting(records: Sequence[Record]) -> set[str]:
    """Returns the URLs in `records` that accept a connection."""
    answers = await asyncio.gather(*(_attempt(record.url) for record in records))
    return {record.url for record, answer in zip(records, answers, strict=True) if answer is _Answer.ACCEPTED}


async def _refusing(records: Sequence[Record]) -> set[str]:
    """Returns the replicas in `records` whose ports refuse two connections, CONFIRM_S apart."""
    refusing = list(records)
    for pause_s in (0.0, CONFIRM_S):
        if refusing:
            await asyncio.sleep(pause_s)
        answers = await asyncio.gather(*(_attempt(record.url) for record in refusing))
        refusing = [r for r, answer in zip(refusing, answers, strict=True) if answer is _Answer.REFUSED]
    return {record.replica for record in refusing}


async def _unanswering(records: Sequence[Record]) -> dict[str, bool]:
    """Returns the replicas in `records` that do not answer at `/health`, each with whether its node can be reached."""
    if not records:
        return {}
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
    answers = await asyncio.gather(*(_connect(parts.hostname, port, CONNECT_S) for port in (parts.port, UNUSED_PORT)))
    return any(answer is not _Answer.NONE for answer in answers)


class _Answer(Enum):
    """How a host answers an attempt to connect."""

    ACCEPTED = auto()
    REFUSED = auto()
    NONE = auto()


async def _attempt(url: str) -> _Answer:
    parts = urlsplit(url)
    return await _connect(parts.hostname, parts.port, REFUSE_S)


async def _connect(host: str | None, port: int | None, timeout_s: float) -> _Answer:
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return _Answer.REFUSED
    except OSError:
        return _Answer.NONE
    writer.close()
    return _Answer.ACCEPTED
