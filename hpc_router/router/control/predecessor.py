"""Copies the session turns and the counts of `continuity` from an older router of the run while both routers run.

The older router still serves when this one becomes the leader, and clients move over one by one. So this router copies
the turns before it is ready, then every second, and whenever a request names a session that it does not know. The older
router must prove its identity first. The calls carry that router's replica key, which is valid at no other server.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from hpc_router.net.auth import challenge_answer, equal_secrets, new_token, replica_key
from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.net.protocol import HANDOVER, HEALTH
from hpc_router.router.control.continuity import Continuity
from hpc_router.router.replicas.sessions import Sessions, Turn
from hpc_router.routing.policy import RouteReason
from hpc_router.state.registry import Record, RecordKind, split_replica

logger = logging.getLogger(__name__)

POLL_S: Final = 1.0
"""Interval in seconds at which new turns are fetched."""
PAGE: Final = 2000
"""Maximum number of turns per response, which is then well below `http_client.MAX_RESPONSE_BYTES`."""


def handover_page(sessions: Sessions, continuity: Continuity, *, skip: int) -> dict[str, Any]:
    """Returns the response of this router to its successor: the counts of `continuity`, and a page of session turns,
    the newest first. `skip`: number of turns to leave out, because earlier pages had them."""
    now = time.monotonic()
    newest_first = list(sessions)[::-1]
    turns = [[name, {**asdict(turn), "at": now - turn.at}] for name, turn in newest_first[skip : skip + PAGE]]
    return {"turns": turns, "continuity": continuity.dump()}


@dataclass(slots=True)
class Predecessor:
    """Copies turns and counts from an older router, the newest one with a lower generation than this one. `replica`:
    name of this router. `secret`: the run's secret, from which the replica keys are derived."""

    replica: str
    secret: str
    sessions: Sessions
    continuity: Continuity
    _record: Record | None = None
    _verified: tuple[str, str | None] | None = None
    _inherited: bool = False
    _fetching: asyncio.Lock = field(default_factory=asyncio.Lock)

    def found(self, records: Mapping[str, Record]) -> None:
        """Chooses the predecessor among the records of the registry: the newest router that is older than this one."""
        generation = split_replica(self.replica)[2]
        older = [r for r in records.values() if r.kind is RecordKind.ROUTER and r.generation < generation]
        self._record = max(older, key=lambda r: r.generation, default=None)

    async def follow_forever(self) -> None:
        while True:
            await self.fetch()
            await asyncio.sleep(POLL_S)

    async def fetch(self) -> None:
        """Fetches the turns and counts that the older router has added since the last call. If it does not answer, logs
        this and changes nothing."""
        record = self._record
        if record is None:
            return
        async with self._fetching, session() as client:
            key, trusted = replica_key(self.secret, record.nonce or ""), record.certificate
            try:
                if self._verified != (record.url, record.nonce):
                    challenge = new_token()
                    health = await call(
                        client, "GET", f"{record.url}{HEALTH}?challenge={challenge}", certificate=trusted
                    )
                    answer = health.body.get("answer") if isinstance(health.body, dict) else None
                    if not equal_secrets(str(answer), challenge_answer(key, challenge)):
                        logger.warning("%s: another process answers at %s", record.replica, record.url)
                        return
                    self._verified = record.url, record.nonce
                skip, more = 0, True
                while more:
                    response = await call(
                        client, "GET", f"{record.url}{HANDOVER}?skip={skip}", token=key, certificate=trusted
                    )
                    if response.status != 200 or not isinstance(response.body, dict):
                        logger.warning(
                            "%s refused to hand over its session turns: %s", record.replica, response.message
                        )
                        return
                    more = self._learn(response.body)
                    skip += PAGE
            except Unreachable as error:
                logger.info("%s does not answer: %s", record.replica, error)

    def _learn(self, page: Mapping[str, Any]) -> bool:
        """Stores the turns and counts of a page. Returns whether the next page may have turns that are unknown here."""
        counts = page.get("continuity") or {}
        if self._inherited:
            self.continuity.follow(counts)
        else:
            self._inherited = True
            self.continuity.absorb(counts)
        now, new = time.monotonic(), 0
        turns = page.get("turns") or []
        for name, values in reversed(turns):
            reason = RouteReason(values["reason"])
            turn = Turn(**{**values, "reason": reason, "at": now - values["at"]})
            known = self.sessions.find(name)
            if known is None or known.at < turn.at - POLL_S or known != turn:
                new += 1
            self.sessions.learn(name, turn)
        return bool(new) and len(turns) == PAGE
