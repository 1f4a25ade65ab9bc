"""Sends one request to the router that leads, and to its successor if that router did not take it.

Rules: a request that no router took (no connection, or the router drains) is sent again until a router takes it or
`follow_s` seconds have passed. A request whose connection ended before a response began, or that got status 401 while
there is a new token, is sent again once, if its body can be sent again. Every other response goes to the caller. A
router gets a request only after `router_identity` has checked the process at its address; one check serves all requests
until one fails. This module knows no HTTP library: subclasses do the I/O.
"""

import random
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar

from hpc_router.client.leader import NoRouterError
from hpc_router.client.retry import RetryState
from hpc_router.client.router_identity import IdentityCache, IdentityCheck
from hpc_router.client.router_source import EndpointFolder, source_of
from hpc_router.errors import ConfigError, HpcRouterError, UnauthorizedError
from hpc_router.state.registry import Record

LOST_NODE_S: Final = 30
SOCKET_OPTIONS: Final[Sequence[tuple[int, int, int]]] = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_NODE_S // 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_NODE_S // 6),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_NODE_S),
)
"""TCP options of connections to routers. A connection to a node that is switched off or cut off breaks after
LOST_NODE_S seconds, also while it only waits for a response. Otherwise it would stay open until the request's own
timeout."""


class RequestNotTakenError(Exception):
    """A connection to the router could not be opened, so the router does not have the request."""


class ResponseLostError(HpcRouterError):
    """The connection ended after the request was sent and before a response arrived."""


class RouterResponse(Protocol):
    """The fields of a response on which the retry rules depend."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, Any]: ...


Q = TypeVar("Q")
A = TypeVar("A", bound=RouterResponse)
T = TypeVar("T")


class RouterFollower(ABC, Generic[Q, A]):
    """Base class: sends the requests of one client to the router that leads. `folder`: the run directory, or the share
    folder for a user other than the owner. Q is the type of a request, A that of a response. The coroutines of a
    subclass may block instead of awaiting; then `follow` also blocks."""

    def __init__(
        self, folder: EndpointFolder, *, follow_s: float, check_lock: AbstractAsyncContextManager[Any]
    ) -> None:
        self._source = source_of(folder)
        self._follow_s = follow_s
        self._token: str | None = None
        self._identity = IdentityCache()
        self._check_lock = check_lock

    @abstractmethod
    async def send(self, request: Q, router: Record, token: str) -> A:
        """Sends the request to `router`, and returns the response once its head has arrived. Raises
        RequestNotTakenError or ResponseLostError, with the HTTP library's error as its cause (`raise ... from`). Calls
        `invalidate` before it raises."""

    @abstractmethod
    async def discard(self, response: A) -> None:
        """Closes a response that the caller of `follow` does not get, because the request is sent again."""

    @abstractmethod
    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function that blocks, and returns its result. An asynchronous subclass runs it in a thread."""

    @abstractmethod
    async def pause(self, length_s: float) -> None: ...

    async def find(self, *, recheck: bool) -> Record | None:
        """Returns the record of the router that leads; None if no router serves. `recheck`: whether the last result may
        be outdated, so that all files are read again."""
        return await self.call(partial(self._source.find, recheck=recheck))

    def adds_token(self, request: Q) -> bool:
        """Returns whether `send` adds the token to this request. Only then can a new token help after a 401."""
        return True

    def invalidate(self) -> None:
        """Makes the next request check the router's identity again. Called after a failed request."""
        self._identity.invalidate(time.monotonic())

    async def follow(self, request: Q, *, replayable: bool) -> A:
        """Sends the request, again if necessary, until a router takes it, and returns the response. `replayable`:
        whether the request's body can be sent more than once.

        Raises NoRouterError if no router took the request in time, ResponseLostError if the response was lost and the
        request must not be sent again, and UnauthorizedError if the router does not know the token with which it has to
        prove itself. Other exceptions of `send` are passed on.
        """
        state = RetryState(follow_s=self._follow_s, now=time.monotonic(), replayable=replayable)
        router: Record | None = None
        while True:
            router = await self._next_router(state, last=router)
            token = self._token if self._token is not None else await self.call(self._read_token)
            check = await self._check(router, token)
            if check is IdentityCheck.TOKEN_UNKNOWN:
                if not await self.call(partial(self._token_changed, token)):
                    raise UnauthorizedError(f"{router.replica} at {router.url}: {check}; ask the deployment's owner")
                continue
            if check is not IdentityCheck.PROVEN:
                state.not_taken(router, check)
                continue
            try:
                response = await self.send(request, router, token)
            except RequestNotTakenError:
                state.not_taken(router, IdentityCheck.UNREACHABLE)
                continue
            except ResponseLostError as error:
                if state.may_resend():
                    continue
                raise ResponseLostError(
                    f"the connection to {router.replica} at {router.url} ended without a response; "
                    "the router may have processed the request"
                ) from error.__cause__
            if state.refused_by_drain(response.status_code, response.headers):
                self.invalidate()
                state.not_taken(router, None)
            elif (
                response.status_code != 401
                or not self.adds_token(request)
                or not state.may_renew_token()
                or not await self.call(partial(self._token_changed, token))
            ):
                return response
            await self.discard(response)

    async def _next_router(self, state: RetryState, *, last: Record | None) -> Record:
        while True:
            router = await self.find(recheck=state.recheck)
            if router is not None and state.may_try(router):
                return router
            pause_s = state.pause_s(time.monotonic(), random.random())
            if pause_s is None:
                raise self._no_router_error(state, router and last)
            await self.pause(pause_s)

    async def _check(self, router: Record, token: str) -> IdentityCheck:
        since = time.monotonic()
        if check := self._identity.lookup(router, since=since, now=since):
            return check
        async with self._check_lock:
            if check := self._identity.lookup(router, since=since, now=time.monotonic()):
                return check
            return await self.call(partial(self._run_check, router, token))

    def _run_check(self, router: Record, token: str) -> IdentityCheck:
        begun_at = time.monotonic()
        result = self._source.check(router, token)
        self._identity.store(router, result, begun_at=begun_at, ended_at=time.monotonic())
        return result

    def _read_token(self) -> str:
        self._token = self._source.token()
        return self._token

    def _token_changed(self, token: str) -> bool:
        """Reads the token again, and returns whether it differs from `token`, which the router refused. If there is
        none any more, `token` is kept."""
        self.invalidate()
        try:
            return self._read_token() != token
        except ConfigError:
            return False

    def _no_router_error(self, state: RetryState, last: Record | None) -> NoRouterError:
        error = self._source.no_router_error()
        if last is None:
            return error
        reason = f": {state.last_check}" if state.last_check else ""
        return NoRouterError(
            f"{last.replica} at {last.url} took no request within {self._follow_s:g} s{reason}; {error}"
        )
