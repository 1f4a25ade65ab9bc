"""Decides whether and when one request of a client may be sent again. Pure: time and jitter are arguments."""

from collections.abc import Mapping
from typing import Final

from hpc_router import backoff
from hpc_router.client.router_identity import IdentityCheck
from hpc_router.net.protocol import DRAINING_HEADER
from hpc_router.state.registry import Record

FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 2.0


class RetryState:
    """The attempts of one request. `recheck`: whether to read all records in the registry folder, because
    `registry.json` may be outdated. `last_check`: result of the identity check of the last router that did not take the
    request; None if that router drains, or before any such router."""

    def __init__(self, *, follow_s: float, now: float, replayable: bool) -> None:
        self._deadline = now + follow_s
        self._replayable = replayable
        self._tried: set[str] = set()
        self._pauses = 0
        self._resent = False
        self._token_renewed = False
        self.recheck = False
        self.last_check: IdentityCheck | None = None

    def may_try(self, router: Record) -> bool:
        """Returns whether the request may be sent to this router now. A router that did not take the request is tried
        again only after a pause."""
        return router.url not in self._tried

    def not_taken(self, router: Record, check: IdentityCheck | None) -> None:
        """Records that `router` did not take the request, so that the request may be sent to another router. `check`:
        result of the router's identity check; None if the router drains."""
        self.recheck, self.last_check = True, check
        self._tried.add(router.url)

    def may_resend(self) -> bool:
        """Returns whether the request may be sent again after its connection ended without a response. This is true at
        most once, and never for a request whose body cannot be sent again."""
        may, self._resent, self.recheck = self._replayable and not self._resent, True, True
        return may

    def may_renew_token(self) -> bool:
        """Returns whether the request may be sent again with a new token after status 401. This is true at most once,
        and never for a request whose body cannot be sent again."""
        may, self._token_renewed = self._replayable and not self._token_renewed, True
        return may

    def refused_by_drain(self, status: int, headers: Mapping[str, str]) -> bool:
        """Returns whether the router drains and has refused the request, so that it can be sent to another router.
        Returns False for a request whose body cannot be sent again."""
        return self._replayable and status == 503 and DRAINING_HEADER in headers

    def pause_s(self, now: float, jitter: float) -> float | None:
        """Returns the seconds to wait before the client looks for a router again; None after the deadline. `jitter` (0
        to 1) spreads the retries of clients that wait for the same router: 0 halves the pause, 1 leaves it whole."""
        left_s = self._deadline - now
        if left_s <= 0:
            return None
        pause_s = backoff.pause_s(self._pauses, first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S) * (0.5 + jitter / 2)
        self._pauses += 1
        self._tried.clear()
        self.recheck = True
        return min(pause_s, left_s)
