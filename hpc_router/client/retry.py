"""What one request of a client has been through: whether it may be tried again, and when. Pure."""

from collections.abc import Mapping
from typing import Final

from hpc_router.client.router_identity import IdentityCheck
from hpc_router.net.protocol import DRAINING_HEADER
from hpc_router.state.registry import Record

FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 2.0


class RetryState:
    """`doubt`: the registry's folder has to be asked. `why`: what kept the last router from taking the request."""

    def __init__(self, *, follow_s: float, now: float, replayable: bool) -> None:
        self._deadline = now + follow_s
        self._replayable = replayable
        self._tried: set[str] = set()
        self._pauses = 0
        self._resent = False
        self._renewed = False
        self.doubt = False
        self.why: IdentityCheck | None = None

    def may_try(self, router: Record) -> bool:
        """A router that took nothing is tried again only after a pause; another one at once."""
        return router.url not in self._tried

    def took_nothing(self, router: Record, why: IdentityCheck | None) -> None:
        self.doubt, self.why = True, why
        self._tried.add(router.url)

    def may_resend(self) -> bool:
        """After a connection that ended without an answer: once."""
        may, self._resent, self.doubt = self._replayable and not self._resent, True, True
        return may

    def may_renew(self) -> bool:
        """After a 401: once, if the token has changed."""
        may, self._renewed = self._replayable and not self._renewed, True
        return may

    def drains(self, status: int, headers: Mapping[str, str]) -> bool:
        return self._replayable and status == 503 and DRAINING_HEADER in headers

    def pause_s(self, now: float, chance: float) -> float | None:
        """Before the next look; None: time is up. `chance` (0 to 1) spreads many clients that wait for one router."""
        left_s = self._deadline - now
        if left_s <= 0:
            return None
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._pauses, 10)) * (0.5 + chance / 2)
        self._pauses += 1
        self._tried.clear()
        self.doubt = True
        return min(pause_s, left_s)
