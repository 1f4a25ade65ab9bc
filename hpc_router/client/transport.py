"""HTTP transports that carry the openai client's requests to the router that leads at that moment.

Rules: a request that no router took (no connection, or the router drains) is sent again until a router takes it or
`follow_s` is over. A request whose connection ended before any response is sent again once. Every response goes to the
caller. The token is added here, after `router_identity` has checked the process at the address, so it cannot go
elsewhere. One check serves all requests of a client until a request fails.
Only `hpc_router.client` imports this module, when it makes a client, because it loads openai.
"""

import importlib
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread
import openai

from hpc_router.client.leader import Leader, NoRouterError
from hpc_router.client.retry import RetryState
from hpc_router.client.router_identity import IdentityCache, IdentityCheck, check_identity
from hpc_router.state.registry import Record
from hpc_router.state.run_directory import RunDir

if TYPE_CHECKING:
    import httpx2 as http
else:  # the HTTP library that the installed openai uses
    http = importlib.import_module(openai.DefaultHttpxClient.__base__.__module__.partition(".")[0])

PLACEHOLDER_HOST: Final = "hpc-router.invalid"
"""Host in the base URL of clients, which never resolves; the transport replaces it by the router's address."""
REGISTRY_TIMEOUT_S: Final = 2.0
"""Limit of one read of the registry; after it the last result is used."""
_LIMITS: Final = {"max_connections": 1000, "max_keepalive_connections": 100}


class NoRouterConnectionError(NoRouterError, openai.APIConnectionError):
    """`NoRouterError` that is also an error of openai, which its client raises at once instead of retrying."""

    def __init__(self, message: str, *, request: "http.Request") -> None:
        openai.APIConnectionError.__init__(self, message=message, request=request)


class _RouterFollower:
    """The part of both transports that neither blocks nor awaits, except where stated."""

    def __init__(self, run: RunDir, *, follow_s: float) -> None:
        self._run = run
        self._leader = Leader(run)
        self._follow_s = follow_s
        self._token: str | None = None
        self._secret: str | None = None
        self._identity = IdentityCache()

    def _new_state(self, request: "http.Request") -> RetryState:
        if request.url.host != PLACEHOLDER_HOST:
            raise http.UnsupportedProtocol(
                f"this client sends requests only to its own router, not to {request.url.host}"
            )
        return RetryState(follow_s=self._follow_s, now=time.monotonic(), replayable=_replayable(request))

    def _known_token(self) -> str:
        if self._token is None:
            self._token = self._run.token()
        return self._token

    def _token_changed(self, token: str) -> bool:
        """Whether the run's token is another one now than `token`, which the router refused. Reads a file."""
        self._invalidate()
        self._token = self._run.token()
        return self._token != token

    def _cached_check(self, router: Record, *, since: float) -> IdentityCheck | None:
        return self._identity.lookup(router, since=since, now=time.monotonic())

    def _run_check(self, router: Record) -> IdentityCheck:
        """Checks the router's identity and stores the result. Blocks."""
        if self._secret is None:
            self._secret = self._run.secret()
        begun_at = time.monotonic()
        result = check_identity(router, self._secret)
        self._identity.store(router, result, begun_at=begun_at, ended_at=time.monotonic())
        return result

    def _invalidate(self) -> None:
        self._identity.invalidate(time.monotonic())

    def _addressed(self, request: "http.Request", router: Record, token: str) -> "http.Request":
        """The request with the router's address and the token; the body is the same stream."""
        at = http.URL(router.url)
        url = request.url.copy_with(scheme=at.scheme, host=at.host, port=at.port)
        headers = request.headers.copy()
        headers["host"] = url.netloc.decode("ascii")
        headers["authorization"] = f"Bearer {token}"
        return http.Request(
            request.method, url, headers=headers, stream=request.stream, extensions=dict(request.extensions)
        )

    def _no_router_error(
        self, request: "http.Request", state: RetryState, last: Record | None
    ) -> NoRouterConnectionError:
        message = str(self._leader.no_router_error())
        if last is not None:
            reason = f": {state.last_check}" if state.last_check else ""
            message = f"{last.replica} at {last.url} took no request within {self._follow_s:g} s{reason}; {message}"
        return NoRouterConnectionError(message, request=request)


class FollowingTransport(_RouterFollower, http.BaseTransport):
    """For synchronous clients; threads may share it."""

    def __init__(self, run: RunDir, *, follow_s: float) -> None:
        super().__init__(run, follow_s=follow_s)
        self._check_lock = threading.Lock()
        self._inner = http.HTTPTransport(trust_env=False, limits=http.Limits(**_LIMITS))

    def handle_request(self, request: "http.Request") -> "http.Response":
        state = self._new_state(request)
        router: Record | None = None
        while True:
            router = self._next_router(request, state, last=router)
            check = self._check(router)
            if check is not IdentityCheck.PROVEN:
                state.not_taken(router, check)
                continue
            token = self._known_token()
            try:
                response = self._inner.handle_request(self._addressed(request, router, token))
            except http.TransportError as error:
                self._invalidate()
                if isinstance(error, http.ConnectError | http.ConnectTimeout):
                    state.not_taken(router, IdentityCheck.UNREACHABLE)
                elif not isinstance(error, http.NetworkError | http.RemoteProtocolError):
                    raise
                elif not state.may_resend():
                    raise _no_response_error(request, router) from error
                continue
            assert isinstance(response.stream, http.SyncByteStream)
            response.stream = _ReportingStream(response.stream, self._invalidate)
            if state.refused_by_drain(response.status_code, response.headers):
                self._invalidate()
                state.not_taken(router, None)
            elif response.status_code != 401 or not state.may_renew_token() or not self._token_changed(token):
                return response
            response.close()

    def close(self) -> None:
        self._inner.close()

    def _check(self, router: Record) -> IdentityCheck:
        since = time.monotonic()
        if check := self._cached_check(router, since=since):
            return check
        with self._check_lock:
            return self._cached_check(router, since=since) or self._run_check(router)

    def _next_router(self, request: "http.Request", state: RetryState, *, last: Record | None) -> Record:
        while True:
            router = self._leader.find(recheck=state.recheck)
            if router is not None and state.may_try(router):
                return router
            pause_s = state.pause_s(time.monotonic(), random.random())
            if pause_s is None:
                raise self._no_router_error(request, state, router and last)
            _sleep(pause_s)


class AsyncFollowingTransport(_RouterFollower, http.AsyncBaseTransport):
    """For event loops of asyncio or trio; threads read the files."""

    def __init__(self, run: RunDir, *, follow_s: float) -> None:
        super().__init__(run, follow_s=follow_s)
        self._check_lock = anyio.Lock()
        self._inner = http.AsyncHTTPTransport(trust_env=False, limits=http.Limits(**_LIMITS))

    async def handle_async_request(self, request: "http.Request") -> "http.Response":
        state = self._new_state(request)
        router: Record | None = None
        while True:
            router = await self._next_router(request, state, last=router)
            check = await self._check(router)
            if check is not IdentityCheck.PROVEN:
                state.not_taken(router, check)
                continue
            token = await anyio.to_thread.run_sync(self._known_token) if self._token is None else self._token
            try:
                response = await self._inner.handle_async_request(self._addressed(request, router, token))
            except http.TransportError as error:
                self._invalidate()
                if isinstance(error, http.ConnectError | http.ConnectTimeout):
                    state.not_taken(router, IdentityCheck.UNREACHABLE)
                elif not isinstance(error, http.NetworkError | http.RemoteProtocolError):
                    raise
                elif not state.may_resend():
                    raise _no_response_error(request, router) from error
                continue
            assert isinstance(response.stream, http.AsyncByteStream)
            response.stream = _AsyncReportingStream(response.stream, self._invalidate)
            if state.refused_by_drain(response.status_code, response.headers):
                self._invalidate()
                state.not_taken(router, None)
            elif (
                response.status_code != 401
                or not state.may_renew_token()
                or not await anyio.to_thread.run_sync(self._token_changed, token)
            ):
                return response
            await response.aclose()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _check(self, router: Record) -> IdentityCheck:
        since = time.monotonic()
        if check := self._cached_check(router, since=since):
            return check
        async with self._check_lock:
            if check := self._cached_check(router, since=since):
                return check
            return await anyio.to_thread.run_sync(self._run_check, router, abandon_on_cancel=True)

    async def _next_router(self, request: "http.Request", state: RetryState, *, last: Record | None) -> Record:
        while True:
            router = await self._find_leader(recheck=state.recheck)
            if router is not None and state.may_try(router):
                return router
            pause_s = state.pause_s(time.monotonic(), random.random())
            if pause_s is None:
                raise self._no_router_error(request, state, router and last)
            await _async_sleep(pause_s)

    async def _find_leader(self, *, recheck: bool) -> Record | None:
        with anyio.move_on_after(REGISTRY_TIMEOUT_S):
            return await anyio.to_thread.run_sync(lambda: self._leader.find(recheck=recheck), abandon_on_cancel=True)
        return self._leader.last


class _ReportingStream(http.SyncByteStream):
    """The body of a response. Calls `on_break` if the connection ends before the body does."""

    def __init__(self, inner: "http.SyncByteStream", on_break: Callable[[], None]) -> None:
        self._inner, self._on_break = inner, on_break

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._inner
        except http.TransportError:
            self._on_break()
            raise

    def close(self) -> None:
        self._inner.close()


class _AsyncReportingStream(http.AsyncByteStream):
    def __init__(self, inner: "http.AsyncByteStream", on_break: Callable[[], None]) -> None:
        self._inner, self._on_break = inner, on_break

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._inner:
                yield chunk
        except http.TransportError:
            self._on_break()
            raise

    async def aclose(self) -> None:
        await self._inner.aclose()


def _replayable(request: "http.Request") -> bool:
    """Whether the body is in memory, so that the request can be sent again."""
    try:
        request.content  # noqa: B018 - raises for a body that is generated while it is sent
    except http.RequestNotRead:
        return False
    return True


def _no_response_error(request: "http.Request", router: Record) -> openai.APIConnectionError:
    connection = f"the connection to {router.replica} at {router.url}"
    message = f"{connection} ended without a response; the router may have processed the request"
    return openai.APIConnectionError(message=message, request=request)


_sleep = time.sleep
_async_sleep = anyio.sleep
