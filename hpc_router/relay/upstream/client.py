"""One request to an upstream server and its response, over connections of our own.

It exists because aiohttp's client costs more than all the rest of a relayed request: a stream's events pass from the
upstream's socket to the sink in one step, without a task being woken. Every failure comes out as an `UpstreamError`:
before the response, while waiting for its first byte, or in its midst. It knows nothing of replicas.
"""

import asyncio
import math
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from types import TracebackType
from typing import Final, Self

from hpc_router.errors import UpstreamConnectError, UpstreamError, UpstreamTimeoutError
from hpc_router.relay.upstream.connection import IN_ONE_PIECE, Connection
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
"""A kept connection that the server had closed shows so within this time; later the request may have been begun."""
_SHORT_TARGET: Final = 256
"""Characters; the lines of a longer one are not remembered."""
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class UpstreamClient:
    """Connections to upstream servers, kept between requests. With a `socket_path` all of them go there.

    `tls`: whom to believe behind https; None: the system's certificates, read when first needed.
    """

    def __init__(
        self, limits: UpstreamTimeouts, *, socket_path: str | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.limits = limits
        self._socket_path = socket_path
        self.pool: Pool[Address | str, Connection] = Pool(keep_s=KEEP_ALIVE_S)
        self._tls = tls

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
        """See `exchange.Upstream`."""
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
        asker: ResponseCallback,
        limits: UpstreamTimeouts | None = None,
    ) -> Connection | None:
        """See `exchange.Upstream`."""
        if len(body) > IN_ONE_PIECE or (connection := self.pool.take(self._socket_path or address)) is None:
            return None
        request = b"%b%bcontent-length: %d\r\n\r\n%b" % (_line(method, address, target), head, len(body), body)
        connection.ask(request, asker, limits or self.limits)
        return connection

    async def answering(self, call: "_Exchange") -> Connection:
        """A connection with the head of its answer there.

        The server may close a kept connection in the moment in which it is used again, so one that dies at once without
        a word costs nothing: the request goes over a new one."""
        kept = call.started or self.pool.take(self._socket_path or call.address)
        if kept is not None:
            try:
                return await self._ask(kept, call, sent=call.started is not None)
            except UpstreamError:
                if not kept.unanswered or kept.patience.spent or kept.asked_s() > STALE_S:
                    raise
        try:
            connection = await self.connected(call.address, watch=call.watch)
        except UpstreamConnectError as error:
            error.sent = kept is not None
            raise
        return await self._ask(connection, call)

    async def _ask(self, connection: Connection, call: "_Exchange", *, sent: bool = False) -> Connection:
        try:
            if not sent:
                connection.begin(call.limits, head_only=call.head_only)
                if call.watch is not None:
                    call.watch(connection.patience)
                await connection.send(call.head, call.body)
            await connection.head()
        except BaseException:
            connection.end()
            raise
        return connection

    async def connected(self, address: Address, *, watch: Callable[[IdleTimer], None] | None = None) -> Connection:
        """A new connection. Raises UpstreamConnectError, and UpstreamTimeoutError when patience was shortened."""
        loop = asyncio.get_running_loop()
        made = Connection(self.pool, self._socket_path or address)
        patience = made.patience
        try:
            async with asyncio.timeout(self.limits.connect_s) as limit:
                patience.on_silence = lambda: limit.reschedule(loop.time())
                patience.begin(math.inf)  # the limit above holds, unless it is shortened
                if watch is not None:
                    watch(patience)
                if self._socket_path is not None:
                    await loop.create_unix_connection(lambda: made, self._socket_path)
                else:
                    tls = await self._tls_context() if address.tls else None
                    await loop.create_connection(lambda: made, address.host, address.port, ssl=tls)
        except BaseException as error:
            made.abort()
            patience.end()
            if patience.spent and isinstance(error, TimeoutError):
                raise UpstreamTimeoutError("the replica sent nothing within the timeout") from error
            if isinstance(error, OSError | UnicodeError):  # a host name that is none is a UnicodeError
                raise UpstreamConnectError(f"cannot connect to the replica: {type(error).__name__}") from error
            raise
        patience.on_silence = made.give_up
        return made

    async def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)  # it reads files
        return self._tls


class _Exchange(AbstractAsyncContextManager[UpstreamResponse]):
    """The context of one request, and what goes over a connection."""

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
        self.started = started  # over which it goes already
        self.address = address
        self.head = head
        self.body = body
        self.head_only = head_only
        self.watch = watch
        self.limits = limits

    async def __aenter__(self) -> UpstreamResponse:
        self._connection = await self._client.answering(self)
        return _Response(self._connection)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._connection is not None
        self._connection.finish()


class _Response(UpstreamResponse):
    def __init__(self, connection: Connection) -> None:
        framer = connection.framer
        self.status = framer.status
        self.headers = framer.headers
        self.length = framer.length
        self._connection = connection

    @property
    def whole(self) -> bytes | None:
        return self._connection.whole()

    async def chunks(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while chunk := await connection.chunk():
            connection.patience.rest()
            yield chunk
            connection.patience.wait(connection.idle_s)

    async def flow(self, sink: Sink) -> None:
        await self._connection.flow(sink)


def request_head(method: str, address: Address, target: str, head: bytes, body: bytes | None) -> bytes:
    """Request line and headers. Raises ValueError for a target that would break out of its line."""
    line = _line(method, address, target)
    if body is None and method not in _WITH_BODY:
        return b"%b%b\r\n" % (line, head)
    return b"%b%bcontent-length: %d\r\n\r\n" % (line, head, len(body or b""))


def _line(method: str, address: Address, target: str) -> bytes:
    """And the host."""
    return (_lines if len(target) <= _SHORT_TARGET else _lines.__wrapped__)(method, address, target)


@lru_cache(maxsize=512)
def _lines(method: str, address: Address, target: str) -> bytes:
    if not target.isascii() or not target.isprintable() or " " in target:
        raise ValueError("a request target holds printable ASCII without spaces")
    return b"%b\r\nhost: %b\r\n" % (f"{method} {address.prefix}{target} HTTP/1.1".encode(), address.header)
