"""One request to an upstream server and its response, over connections of our own.

It exists because aiohttp's client costs more than all the rest of a relayed request: a stream's events pass from the
upstream's socket to the sink in one step, without a task being woken. Every failure comes out as an `UpstreamError`:
before the response, while waiting for its first byte, or in its midst. It knows nothing of replicas.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, NamedTuple, Self

from multidict import CIMultiDict
from yarl import URL

from hpc_router.errors import UpstreamConnectError, UpstreamError, UpstreamTimeoutError
from hpc_router.relay.connection import Connection
from hpc_router.relay.exchange import Limits, Sink, UpstreamResponse
from hpc_router.relay.patience import Patience
from hpc_router.relay.pool import Pool

KEEP_ALIVE_S: Final = 4.0
"""Shorter than the 5 s after which uvicorn, the server of both real engines, closes an idle connection."""
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_OURS: Final = ("host", "content-length", "transfer-encoding")


class Address(NamedTuple):
    """`path` of a unix socket, or `host` and `port`."""

    path: str | None
    host: str
    port: int
    tls: bool


class _Call(NamedTuple):
    """What goes over a connection."""

    head: bytes
    body: bytes | None
    head_only: bool


class _Response(UpstreamResponse):
    def __init__(self, connection: Connection, patience: Patience) -> None:
        super().__init__(connection.framer.status, connection.framer.headers)
        self._connection = connection
        self._patience = patience

    async def chunks(self) -> AsyncIterator[bytes]:
        while chunk := await self._connection.chunk():
            self._patience.rest()
            yield chunk
            self._patience.wait(self._connection.idle_s)

    async def flow(self, sink: Sink) -> None:
        await self._connection.flow(sink)


class UpstreamClient:
    """Connections to upstream servers, kept between requests. With a `socket_path` all of them go there."""

    def __init__(self, limits: Limits, *, socket_path: str | None = None) -> None:
        self._limits = limits
        self._socket_path = socket_path
        self._pool: Pool[Address, Connection] = Pool(keep_s=KEEP_ALIVE_S)
        self._tls: ssl.SSLContext | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.close()

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: URL,
        *,
        headers: CIMultiDict[str] | None = None,
        body: bytes | None = None,
        watch: Callable[[Patience], None] | None = None,
    ) -> AsyncIterator[UpstreamResponse]:
        """See `exchange.Upstream`."""
        address = Address(self._socket_path, url.raw_host or "", url.port or 0, url.scheme == "https")
        call = _Call(request_head(method, url, headers, body), body, method == "HEAD")
        connection: Connection | None = None
        try:
            async with asyncio.timeout(None) as timeout:
                patience = Patience(timeout)
                patience.wait(self._limits.first_byte_s)
                if watch is not None:
                    watch(patience)
                try:
                    connection = await self._answering(address, call, patience)
                    yield _Response(connection, patience)
                finally:
                    patience.end()
                    if connection is not None and connection.end():
                        self._pool.put(address, connection)
        except TimeoutError as error:
            raise UpstreamTimeoutError("the replica fell silent") from error

    async def _answering(self, address: Address, call: _Call, patience: Patience) -> Connection:
        """A connection with the head of its answer there. The server may close a kept connection in the moment in
        which it is used again, so one that dies without a word costs nothing: the request goes over a new one."""
        kept = self._pool.take(address)
        if kept is not None:
            try:
                return await self._ask(kept, call, patience)
            except UpstreamError:
                if not kept.unanswered:
                    raise
        return await self._ask(await self._connect(address), call, patience)

    async def _ask(self, connection: Connection, call: _Call, patience: Patience) -> Connection:
        connection.begin(patience, idle_s=self._limits.idle_s, head_only=call.head_only)
        try:
            await connection.send(call.head, call.body)
            await connection.head()
        except BaseException:
            connection.end()
            raise
        return connection

    async def _connect(self, address: Address) -> Connection:
        loop = asyncio.get_running_loop()
        made = Connection(self._pool.discard)
        try:
            async with asyncio.timeout(self._limits.connect_s):
                if address.path is not None:
                    await loop.create_unix_connection(lambda: made, address.path)
                else:
                    context = await self._tls_context() if address.tls else None
                    await loop.create_connection(lambda: made, address.host, address.port, ssl=context)
        except (OSError, UnicodeError) as error:
            made.abort()
            raise UpstreamConnectError(f"cannot connect to the replica: {type(error).__name__}") from error
        except BaseException:
            made.abort()
            raise
        return made

    async def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)  # it reads files
        return self._tls


def request_head(method: str, url: URL, headers: CIMultiDict[str] | None, body: bytes | None) -> bytes:
    """Request line and headers. Raises ValueError for what would break out of its line, and for framing headers."""
    fields = [*headers.items()] if headers else []
    if any(name.lower() in _OURS for name, _ in fields):
        raise ValueError(f"the upstream client sets these headers itself: {', '.join(_OURS)}")
    if body is not None or method in _WITH_BODY:
        fields.append(("Content-Length", str(len(body or b""))))
    lines = [f"{method} {url.raw_path_qs} HTTP/1.1", f"Host: {url.host_port_subcomponent}"]
    lines += [f"{name}: {value}" for name, value in fields]
    text = "\r\n".join(lines)
    if text.count("\n") != len(fields) + 1 or text.count("\r") != len(fields) + 1 or "\0" in text:
        raise ValueError("a control character in a request line or header")
    return (text + "\r\n\r\n").encode("utf-8", "surrogateescape")
