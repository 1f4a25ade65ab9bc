"""HTTP client for upstream servers, with pooled connections.

aiohttp's client is not used because it costs more CPU than all other work of a relayed request. Here the events of a
stream go from the upstream socket to the sink in one step, without waking a task. Every failure is raised as an
`UpstreamError`, before, at or within the response. The module knows nothing of replicas.
"""

import asyncio
import math
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from types import TracebackType
from typing import Final, Self

from hpc_router.errors import UpstreamConnectError, UpstreamError, UpstreamTimeoutError
from hpc_router.net.protocol import path_at
from hpc_router.relay.upstream.connection import MAX_SINGLE_WRITE_BYTES, Connection
from hpc_router.relay.upstream.interface import (
    Address,
    PendingRequest,
    ResponseCallback,
    Sink,
    UpstreamResponse,
    UpstreamTimeouts,
)
from hpc_router.relay.upstream.pool import Pool
from hpc_router.relay.upstream.timeouts import IdleTimer

KEEP_ALIVE_S: Final = 4.0
"""Shorter than the 5 s after which uvicorn, the server of both real engines, closes an idle connection."""
STALE_S: Final = 1.0
"""A pooled connection that the server has closed fails within this time; later the server may have started the
request."""
_SHORT_TARGET: Final = 256
"""Characters; the request lines of longer targets are not cached."""
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class UpstreamClient:
    """Connections to upstream servers, pooled between requests. With a `socket_path`, all use that Unix socket.

    `tls`: the context for https; None: the system's certificates, loaded at first use. `resend`: a request on a pooled
    connection that the server had closed is sent again; otherwise the caller decides. `socket_options`: of each TCP
    connection, as arguments of `setsockopt`.
    """

    def __init__(
        self,
        limits: UpstreamTimeouts,
        *,
        socket_path: str | None = None,
        tls: ssl.SSLContext | None = None,
        resend: bool = True,
        socket_options: Iterable[tuple[int, int, int]] = (),
    ) -> None:
        self.limits = limits
        self._resend = resend
        self._socket_options = tuple(socket_options)
        self._socket_path = socket_path
        self.pool: Pool[Address | str, Connection] = Pool(keep_s=KEEP_ALIVE_S)
        self._tls = tls

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.pool.close()

    def request(
        self,
        method: str,
        address: Address,
        target: str,
        *,
        head: bytes = b"",
        body: bytes | None = None,
        watch: Callable[[IdleTimer], None] | None = None,
        started: PendingRequest | None = None,
        limits: UpstreamTimeouts | None = None,
    ) -> "_Exchange":
        """See `interface.Upstream`."""
        assert started is None or isinstance(started, Connection)
        request = request_head(method, address, target, head, body)
        return _Exchange(self, address, request, body, method == "HEAD", watch, started, limits or self.limits)

    def start(
        self,
        method: str,
        address: Address,
        target: str,
        *,
        head: bytes,
        body: bytes,
        callback: ResponseCallback,
        limits: UpstreamTimeouts | None = None,
    ) -> Connection | None:
        """See `interface.Upstream`."""
        if len(body) > MAX_SINGLE_WRITE_BYTES or (connection := self.pool.get(self._socket_path or address)) is None:
            return None
        request = b"%b%bcontent-length: %d\r\n\r\n%b" % (_request_line(method, address, target), head, len(body), body)
        connection.start(request, callback, limits or self.limits)
        return connection

    async def response_started(self, call: "_Exchange") -> Connection:
        """Send the request and wait for the head of the response. Returns the connection.

        The server may close a pooled connection while it is being used again. If it closes at once without sending a
        byte, the request is sent again over a new connection."""
        pooled = call.started or self.pool.get(self._socket_path or call.address)
        if pooled is not None:
            try:
                return await self._exchange_on(pooled, call, sent=call.started is not None)
            except UpstreamError:
                stale = pooled.nothing_received and not pooled.idle_timer.expired and pooled.exchange_age_s() <= STALE_S
                if not (stale and self._resend):
                    raise
        try:
            connection = await self.connect(call.address, watch=call.watch)
        except UpstreamConnectError as error:
            error.sent = pooled is not None
            raise
        return await self._exchange_on(connection, call)

    async def _exchange_on(self, connection: Connection, call: "_Exchange", *, sent: bool = False) -> Connection:
        try:
            if not sent:
                connection.begin(call.limits, head_only=call.head_only)
                if call.watch is not None:
                    call.watch(connection.idle_timer)
                await connection.send(call.head, call.body)
            await connection.wait_for_head()
        except BaseException:
            connection.end()
            raise
        return connection

    async def connect(self, address: Address, *, watch: Callable[[IdleTimer], None] | None = None) -> Connection:
        """A new connection. Raises UpstreamConnectError, and UpstreamTimeoutError if the idle timer was tightened."""
        loop = asyncio.get_running_loop()
        made = Connection(self.pool, self._socket_path or address)
        idle_timer = made.idle_timer
        try:
            async with asyncio.timeout(self.limits.connect_s) as limit:
                idle_timer.on_timeout = lambda: limit.reschedule(loop.time())
                idle_timer.begin(math.inf)  # connect_s applies unless the timer is tightened
                if watch is not None:
                    watch(idle_timer)
                if self._socket_path is not None:
                    await loop.create_unix_connection(lambda: made, self._socket_path)
                else:
                    tls = await self._tls_context() if address.tls else None
                    transport, _ = await loop.create_connection(lambda: made, address.host, address.port, ssl=tls)
                    for option in self._socket_options:
                        transport.get_extra_info("socket").setsockopt(*option)
        except BaseException as error:
            made.abort()
            idle_timer.end()
            if idle_timer.expired and isinstance(error, TimeoutError):
                raise UpstreamTimeoutError("the replica sent nothing within the timeout") from error
            if isinstance(error, OSError | UnicodeError):  # an invalid host name is a UnicodeError
                raise UpstreamConnectError(f"cannot connect to the replica: {type(error).__name__}") from error
            raise
        idle_timer.on_timeout = made.on_timeout
        return made

    async def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)  # reads files
        return self._tls


class _Exchange(AbstractAsyncContextManager[UpstreamResponse]):
    """Context manager of one request and its response."""

    __slots__ = ("_client", "_connection", "address", "body", "head", "head_only", "limits", "started", "watch")

    def __init__(
        self,
        client: UpstreamClient,
        address: Address,
        head: bytes,
        body: bytes | None,
        head_only: bool,
        watch: Callable[[IdleTimer], None] | None,
        started: Connection | None,
        limits: UpstreamTimeouts,
    ) -> None:
        self._client = client
        self._connection: Connection | None = None
        self.started = started  # the connection over which the request was sent already
        self.address = address
        self.head = head
        self.body = body
        self.head_only = head_only
        self.watch = watch
        self.limits = limits

    async def __aenter__(self) -> UpstreamResponse:
        self._connection = await self._client.response_started(self)
        return _Response(self._connection)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._connection is not None
        self._connection.finish()


class _Response(UpstreamResponse):
    def __init__(self, connection: Connection) -> None:
        parser = connection.parser
        self.status = parser.status
        self.headers = parser.headers
        self.length = parser.length
        self._connection = connection

    @property
    def complete_body(self) -> bytes | None:
        return self._connection.complete_body()

    async def chunks(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while chunk := await connection.chunk():
            connection.idle_timer.pause()
            yield chunk
            connection.idle_timer.restart(connection.idle_s)

    async def stream_to(self, sink: Sink) -> None:
        await self._connection.stream_to(sink)


def request_head(method: str, address: Address, target: str, head: bytes, body: bytes | None) -> bytes:
    """Request line and headers. Raises ValueError for a target that would end the request line."""
    line = _request_line(method, address, target)
    if body is None and method not in _WITH_BODY:
        return b"%b%b\r\n" % (line, head)
    return b"%b%bcontent-length: %d\r\n\r\n" % (line, head, len(body or b""))


def _request_line(method: str, address: Address, target: str) -> bytes:
    """Request line and `Host` header."""
    return (_cached_request_line if len(target) <= _SHORT_TARGET else _cached_request_line.__wrapped__)(
        method, address, target
    )


@lru_cache(maxsize=512)
def _cached_request_line(method: str, address: Address, target: str) -> bytes:
    if not target.isascii() or not target.isprintable() or " " in target:
        raise ValueError("a request target holds printable ASCII without spaces")
    path = path_at(address.base_path, target)
    return b"%b\r\nhost: %b\r\n" % (f"{method} {path} HTTP/1.1".encode(), address.header)
