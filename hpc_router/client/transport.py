"""Transports that carry the openai client's requests to whichever router leads now.

Rules: what provably reached nobody (no connection, a router that drains) is tried again until a router takes it or
`follow_s` is over; a request whose connection ended before any answer is sent once more, never twice more; whatever the
router answered goes to the caller. The token is added here, once what answers at the address has proven to be the
router (`proof`), so that it cannot go elsewhere. One proof serves all requests of a client; what goes wrong ends it.
Only `hpc_router.client` imports this, when it makes a client: it loads openai.
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
from hpc_router.client.router_identity import IdentityCheck, Proof, examine
from hpc_router.state.registry import Record
from hpc_router.state.run_directory import RunDir

if TYPE_CHECKING:
    import httpx2 as http
else:  # whichever HTTP library the installed openai is made with
    http = importlib.import_module(openai.DefaultHttpxClient.__base__.__module__.partition(".")[0])

NOWHERE: Final = "hpc-router.invalid"
"""The host that clients believe they talk to; it resolves nowhere."""
PATIENCE_S: Final = 2.0
"""For a file system, whose last view stands afterwards."""
_LIMITS: Final = {"max_connections": 1000, "max_keepalive_connections": 100}


class NoRouterConnectionError(NoRouterError, openai.APIConnectionError):
    """`NoRouterError` as the openai client knows it, so that it is told at once instead of retried."""

    def __init__(self, message: str, *, request: "http.Request") -> None:
        openai.APIConnectionError.__init__(self, message=message, request=request)


class _Follower:
    """What both transports share: everything but waiting."""

    def __init__(self, run: RunDir, *, follow_s: float) -> None:
        self._run = run
        self._leader = Leader(run)
        self._follow_s = follow_s
        self._token: str | None = None
        self._secret: str | None = None
        self._proof = Proof()

    def _begin(self, request: "http.Request") -> RetryState:
        if request.url.host != NOWHERE:
            raise http.UnsupportedProtocol(f"this client talks to its own router only, not to {request.url.host}")
        return RetryState(follow_s=self._follow_s, now=time.monotonic(), replayable=_replayable(request))

    def _known_token(self) -> str:
        if self._token is None:
            self._token = self._run.token()
        return self._token

    def _renewed(self, token: str) -> bool:
        """Whether another one than this, which was refused, stands in the file now."""
        self._doubt()
        self._token = self._run.token()
        return self._token != token

    def _proven(self, router: Record, *, since: float) -> IdentityCheck | None:
        return self._proof.of(router, since=since, now=time.monotonic())

    def _examined(self, router: Record) -> IdentityCheck:
        """Blocks."""
        if self._secret is None:
            self._secret = self._run.secret()
        begun_at = time.monotonic()
        finding = examine(router, self._secret)
        self._proof.learn(router, finding, begun_at=begun_at, ended_at=time.monotonic())
        return finding

    def _doubt(self) -> None:
        self._proof.doubt(time.monotonic())

    def _addressed(self, request: "http.Request", router: Record, token: str) -> "http.Request":
        """The same bytes to the router's address."""
        at = http.URL(router.url)
        url = request.url.copy_with(scheme=at.scheme, host=at.host, port=at.port)
        headers = request.headers.copy()
        headers["host"] = url.netloc.decode("ascii")
        headers["authorization"] = f"Bearer {token}"
        return http.Request(
            request.method, url, headers=headers, stream=request.stream, extensions=dict(request.extensions)
        )

    def _given_up(self, request: "http.Request", errand: RetryState, last: Record | None) -> NoRouterConnectionError:
        message = str(self._leader.missing())
        if last is not None:
            why = f": {errand.why}" if errand.why else ""
            message = f"{last.replica} at {last.url} took no request within {self._follow_s:g} s{why}; {message}"
        return NoRouterConnectionError(message, request=request)


class FollowingTransport(_Follower, http.BaseTransport):
    def __init__(self, run: RunDir, *, follow_s: float) -> None:
        super().__init__(run, follow_s=follow_s)
        self._asking = threading.Lock()
        self._inner = http.HTTPTransport(trust_env=False, limits=http.Limits(**_LIMITS))

    def handle_request(self, request: "http.Request") -> "http.Response":
        errand = self._begin(request)
        router: Record | None = None
        while True:
            router = self._find(request, errand, last=router)
            finding = self._find_out(router)
            if finding is not IdentityCheck.PROVEN:
                errand.took_nothing(router, finding)
                continue
            token = self._known_token()
            try:
                response = self._inner.handle_request(self._addressed(request, router, token))
            except http.TransportError as error:
                self._doubt()
                if isinstance(error, http.ConnectError | http.ConnectTimeout):
                    errand.took_nothing(router, IdentityCheck.NOBODY)
                elif not isinstance(error, http.NetworkError | http.RemoteProtocolError):
                    raise
                elif not errand.may_resend():
                    raise _lost(request, router) from error
                continue
            assert isinstance(response.stream, http.SyncByteStream)
            response.stream = _Watched(response.stream, self._doubt)
            if errand.drains(response.status_code, response.headers):
                self._doubt()
                errand.took_nothing(router, None)
            elif response.status_code != 401 or not errand.may_renew() or not self._renewed(token):
                return response
            response.close()

    def close(self) -> None:
        self._inner.close()

    def _find_out(self, router: Record) -> IdentityCheck:
        since = time.monotonic()
        if finding := self._proven(router, since=since):
            return finding
        with self._asking:
            return self._proven(router, since=since) or self._examined(router)

    def _find(self, request: "http.Request", errand: RetryState, *, last: Record | None) -> Record:
        while True:
            router = self._leader.look(doubt=errand.doubt)
            if router is not None and errand.may_try(router):
                return router
            pause_s = errand.pause_s(time.monotonic(), random.random())
            if pause_s is None:
                raise self._given_up(request, errand, router and last)
            _sleep(pause_s)


class AsyncFollowingTransport(_Follower, http.AsyncBaseTransport):
    """The same for event loops, of asyncio or trio: files are read beside the loop."""

    def __init__(self, run: RunDir, *, follow_s: float) -> None:
        super().__init__(run, follow_s=follow_s)
        self._asking = anyio.Lock()
        self._inner = http.AsyncHTTPTransport(trust_env=False, limits=http.Limits(**_LIMITS))

    async def handle_async_request(self, request: "http.Request") -> "http.Response":
        errand = self._begin(request)
        router: Record | None = None
        while True:
            router = await self._find(request, errand, last=router)
            finding = await self._find_out(router)
            if finding is not IdentityCheck.PROVEN:
                errand.took_nothing(router, finding)
                continue
            token = await anyio.to_thread.run_sync(self._known_token) if self._token is None else self._token
            try:
                response = await self._inner.handle_async_request(self._addressed(request, router, token))
            except http.TransportError as error:
                self._doubt()
                if isinstance(error, http.ConnectError | http.ConnectTimeout):
                    errand.took_nothing(router, IdentityCheck.NOBODY)
                elif not isinstance(error, http.NetworkError | http.RemoteProtocolError):
                    raise
                elif not errand.may_resend():
                    raise _lost(request, router) from error
                continue
            assert isinstance(response.stream, http.AsyncByteStream)
            response.stream = _AsyncWatched(response.stream, self._doubt)
            if errand.drains(response.status_code, response.headers):
                self._doubt()
                errand.took_nothing(router, None)
            elif (
                response.status_code != 401
                or not errand.may_renew()
                or not await anyio.to_thread.run_sync(self._renewed, token)
            ):
                return response
            await response.aclose()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _find_out(self, router: Record) -> IdentityCheck:
        since = time.monotonic()
        if finding := self._proven(router, since=since):
            return finding
        async with self._asking:
            if finding := self._proven(router, since=since):
                return finding
            return await anyio.to_thread.run_sync(self._examined, router, abandon_on_cancel=True)

    async def _find(self, request: "http.Request", errand: RetryState, *, last: Record | None) -> Record:
        while True:
            router = await self._look(doubt=errand.doubt)
            if router is not None and errand.may_try(router):
                return router
            pause_s = errand.pause_s(time.monotonic(), random.random())
            if pause_s is None:
                raise self._given_up(request, errand, router and last)
            await _async_sleep(pause_s)

    async def _look(self, *, doubt: bool) -> Record | None:
        with anyio.move_on_after(PATIENCE_S):
            return await anyio.to_thread.run_sync(lambda: self._leader.look(doubt=doubt), abandon_on_cancel=True)
        return self._leader.view


class _Watched(http.SyncByteStream):
    """An answer's bytes; `on_break` hears when they end too early."""

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


class _AsyncWatched(http.AsyncByteStream):
    def __init__(self, inner: "http.AsyncByteStream", on_break: Callable[[], None]) -> None:
        self._inner, self._on_break = inner, on_break

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._inner:
                yield piece
        except http.TransportError:
            self._on_break()
            raise

    async def aclose(self) -> None:
        await self._inner.aclose()


def _replayable(request: "http.Request") -> bool:
    try:
        request.content  # noqa: B018 - raises for a body that is made while it is sent
    except http.RequestNotRead:
        return False
    return True


def _lost(request: "http.Request", router: Record) -> openai.APIConnectionError:
    message = f"the connection to {router.replica} at {router.url} ended without an answer; it may have done the work"
    return openai.APIConnectionError(message=message, request=request)


_sleep = time.sleep
_async_sleep = anyio.sleep
