"""HTTP transports that carry the openai client's requests to the router that leads at that moment.

`following` has the rules; these classes add the I/O of httpx, sync and async. The token is added here, so it goes only
to a router whose identity was checked.
Only `hpc_router.client` imports this module, when it makes a client, because it loads openai.
"""

import importlib
import threading
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import anyio.to_thread
import openai

from hpc_router.client.following import SOCKET_OPTIONS, RequestNotTakenError, ResponseLostError, RouterFollower
from hpc_router.client.leader import REGISTRY_TIMEOUT_S, NoRouterError
from hpc_router.client.router_source import EndpointFolder
from hpc_router.errors import UnauthorizedError
from hpc_router.net.tls import client_context
from hpc_router.state.registry import Record

if TYPE_CHECKING:
    import httpx2 as http
else:  # the HTTP library that the installed openai uses
    http = importlib.import_module(openai.DefaultHttpxClient.__base__.__module__.partition(".")[0])

PLACEHOLDER_HOST: Final = "hpc-router.invalid"
"""Host in the base URL of clients. It never resolves; the transport replaces it by the router's address."""
_T = TypeVar("_T")


class NoRouterConnectionError(NoRouterError, openai.APIConnectionError):
    """A `NoRouterError` that is also an `openai.APIConnectionError`, so that the openai client raises it at once
    instead of retrying."""

    def __init__(self, message: str, *, request: "http.Request") -> None:
        openai.APIConnectionError.__init__(self, message=message, request=request)


class _HttpFollower(RouterFollower["http.Request", "http.Response"]):
    """Base class of the synchronous and the asynchronous transport, with the code that they share."""

    @abstractmethod
    async def exchange(self, request: "http.Request", certificate: str | None) -> "http.Response":
        """Sends the request to the address in its URL, and returns the response. `certificate`: the only certificate
        that the router may have, in PEM; None: the request is sent without TLS."""

    async def respond(self, request: "http.Request") -> "http.Response":
        if request.url.host != PLACEHOLDER_HOST:
            raise http.UnsupportedProtocol(
                f"this client sends requests only to its own router, not to {request.url.host}"
            )
        try:
            return await self.follow(request, replayable=_replayable(request))
        except NoRouterError as error:
            raise NoRouterConnectionError(str(error), request=request) from None
        except UnauthorizedError as error:
            body = {"message": str(error), "type": "authentication_error", "code": "unauthorized", "param": None}
            return http.Response(401, json={"error": body}, request=request)
        except ResponseLostError as error:
            raise openai.APIConnectionError(message=str(error), request=request) from error.__cause__

    async def send(self, request: "http.Request", router: Record, token: str) -> "http.Response":
        try:
            response = await self.exchange(_addressed(request, router, token), router.certificate)
        except http.TransportError as error:
            self.invalidate()
            if isinstance(error, http.ConnectError | http.ConnectTimeout):
                raise RequestNotTakenError from error
            if isinstance(error, http.NetworkError | http.RemoteProtocolError):
                raise ResponseLostError from error
            raise
        response.stream = _ReportingStream(response.stream, self.invalidate)
        return response


class FollowingTransport(_HttpFollower, http.BaseTransport):
    """Transport of synchronous clients. Threads may share it."""

    def __init__(self, folder: EndpointFolder, *, follow_s: float) -> None:
        super().__init__(folder, follow_s=follow_s, check_lock=_BlockingLock())
        self._inner: dict[str | None, http.HTTPTransport] = {None: http.HTTPTransport(**_options())}

    def handle_request(self, request: "http.Request") -> "http.Response":
        return _completed(self.respond(request))

    def close(self) -> None:
        for inner in self._inner.values():
            inner.close()

    async def exchange(self, request: "http.Request", certificate: str | None) -> "http.Response":
        inner = self._inner.get(certificate)
        if inner is None:
            inner = self._inner.setdefault(certificate, http.HTTPTransport(**_options(certificate)))
        return inner.handle_request(request)

    async def discard(self, response: "http.Response") -> None:
        response.close()

    async def call(self, function: Callable[[], _T]) -> _T:
        return function()

    async def pause(self, length_s: float) -> None:
        _sleep(length_s)


class AsyncFollowingTransport(_HttpFollower, http.AsyncBaseTransport):
    """Transport of asynchronous clients, on asyncio or trio. Reads the registry in threads, so that it does not block
    the event loop."""

    def __init__(self, folder: EndpointFolder, *, follow_s: float) -> None:
        super().__init__(folder, follow_s=follow_s, check_lock=anyio.Lock())
        self._inner: dict[str | None, http.AsyncHTTPTransport] = {None: http.AsyncHTTPTransport(**_options())}

    async def handle_async_request(self, request: "http.Request") -> "http.Response":
        return await self.respond(request)

    async def aclose(self) -> None:
        for inner in self._inner.values():
            await inner.aclose()

    async def exchange(self, request: "http.Request", certificate: str | None) -> "http.Response":
        inner = self._inner.get(certificate)
        if inner is None:
            inner = self._inner[certificate] = http.AsyncHTTPTransport(**_options(certificate))
        return await inner.handle_async_request(request)

    async def discard(self, response: "http.Response") -> None:
        await response.aclose()

    async def call(self, function: Callable[[], _T]) -> _T:
        return await anyio.to_thread.run_sync(function, abandon_on_cancel=True)

    async def find(self, *, recheck: bool) -> Record | None:
        with anyio.move_on_after(REGISTRY_TIMEOUT_S):
            return await super().find(recheck=recheck)
        return self._source.last

    async def pause(self, length_s: float) -> None:
        await _async_sleep(length_s)


class _BlockingLock(AbstractAsyncContextManager[None]):
    """A thread lock with the interface of `async with`, for code that blocks instead of awaiting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    async def __aenter__(self) -> None:
        self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


class _ReportingStream(http.SyncByteStream, http.AsyncByteStream):
    """The body of a response. Calls `on_break` if the connection ends before the body is complete."""

    def __init__(self, inner: Any, on_break: Callable[[], None]) -> None:
        self._inner, self._on_break = inner, on_break

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._inner
        except http.TransportError:
            self._on_break()
            raise

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._inner:
                yield chunk
        except http.TransportError:
            self._on_break()
            raise

    def close(self) -> None:
        self._inner.close()

    async def aclose(self) -> None:
        await self._inner.aclose()


def _options(certificate: str | None = None) -> dict[str, Any]:
    """Returns the arguments of httpx's transports, both synchronous and asynchronous. `certificate`: the router's
    certificate, in PEM; None: no TLS."""
    limits = http.Limits(max_connections=1000, max_keepalive_connections=100)
    verify = True if certificate is None else client_context(certificate)
    return {"trust_env": False, "limits": limits, "socket_options": SOCKET_OPTIONS, "verify": verify}


def _completed(blocking: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine that blocks instead of awaiting, and returns its result. No event loop is needed, because such a
    coroutine is never suspended."""
    try:
        blocking.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    blocking.close()
    raise AssertionError("a synchronous transport has awaited")


def _addressed(request: "http.Request", router: Record, token: str) -> "http.Request":
    """Returns a copy of the request with the router's address and the token. Both have the same body stream."""
    at = http.URL(router.url)
    url = request.url.copy_with(scheme=at.scheme, host=at.host, port=at.port)
    headers = request.headers.copy()
    headers["host"] = url.netloc.decode("ascii")
    headers["authorization"] = f"Bearer {token}"
    return http.Request(
        request.method, url, headers=headers, stream=request.stream, extensions=dict(request.extensions)
    )


def _replayable(request: "http.Request") -> bool:
    """Returns whether the body is in memory, so that the request can be sent again."""
    try:
        request.content  # noqa: B018 - raises for a body that is generated while it is sent
    except http.RequestNotRead:
        return False
    return True


_sleep = time.sleep
_async_sleep = anyio.sleep
