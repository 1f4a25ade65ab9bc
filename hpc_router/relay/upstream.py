"""One request to an upstream server and its response, over connections of our own.

It exists because aiohttp's client costs more than all the rest of a relayed request: a stream's events pass from the
upstream's socket to the sink in one step, without a task being woken. Every failure comes out as an `UpstreamError`:
before the response, while waiting for its first byte, or in its midst. It knows nothing of replicas.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
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
OWN_HEADERS: Final = ("host", "content-length", "transfer-encoding")


class UpstreamClient:
    """Connections to upstream servers, kept between requests. With a `socket_path` all of them go there.

    `tls`: whom to believe behind https; None: the system's certificates, read when first needed.
    """

    def __init__(self, limits: Limits, *, socket_path: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.limits = limits
        self._socket_path = socket_path
        self.pool: Pool[Origin, Connection] = Pool(keep_s=KEEP_ALIVE_S)
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
        url: URL,
        *,
        headers: CIMultiDict[str] | None = None,
        body: bytes | None = None,
        watch: Callable[[Patience], None] | None = None,
    ) -> "_Exchange":
        """See `exchange.Upstream`."""
        origin = origin_of(url.scheme, url.raw_authority)
        address = origin if self._socket_path is None else Origin(self._socket_path, 0, tls=False, header="")
        head = request_head(method, url.raw_path_qs, origin.header, headers, body)
        return _Exchange(self, _Call(address, head, body, head_only=method == "HEAD"), watch)

    async def answering(self, call: "_Call", patience: Patience) -> Connection:
        """A connection with the head of its answer there. The server may close a kept connection in the moment in
        which it is used again, so one that dies without a word costs nothing: the request goes over a new one."""
        kept = self.pool.take(call.origin)
        if kept is not None:
            try:
                return await self._ask(kept, call, patience)
            except UpstreamError:
                if not kept.unanswered or patience.spent:
                    raise
        return await self._ask(await self._connect(call.origin, patience), call, patience)

    async def _ask(self, connection: Connection, call: "_Call", patience: Patience) -> Connection:
        connection.begin(patience, idle_s=self.limits.idle_s, head_only=call.head_only)
        try:
            await connection.send(call.head, call.body)
            await connection.head()
        except BaseException:
            connection.end()
            raise
        return connection

    async def _connect(self, origin: "Origin", patience: Patience) -> Connection:
        loop = asyncio.get_running_loop()
        made = Connection(self.pool.discard)
        try:
            async with asyncio.timeout(self.limits.connect_s) as limit:
                patience.on_silence = lambda: limit.reschedule(loop.time())
                if self._socket_path is not None:
                    await loop.create_unix_connection(lambda: made, self._socket_path)
                else:
                    tls = await self._tls_context() if origin.tls else None
                    await loop.create_connection(lambda: made, origin.host, origin.port, ssl=tls)
        except BaseException as error:
            made.abort()
            if patience.spent and isinstance(error, TimeoutError):
                raise UpstreamTimeoutError("the replica fell silent") from error
            if isinstance(error, OSError | UnicodeError):  # a host name that is none is a UnicodeError
                raise UpstreamConnectError(f"cannot connect to the replica: {type(error).__name__}") from error
            raise
        return made

    async def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)  # it reads files
        return self._tls


class Origin(NamedTuple):
    """Where connections are interchangeable; `header` is its `Host`."""

    host: str
    port: int
    tls: bool
    header: str


class _Call(NamedTuple):
    """What goes over a connection."""

    origin: Origin
    head: bytes
    body: bytes | None
    head_only: bool


class _Exchange:
    """The context of one request."""

    __slots__ = ("_call", "_client", "_connection", "_patience", "_watch")

    def __init__(self, client: UpstreamClient, call: _Call, watch: Callable[[Patience], None] | None) -> None:
        self._client = client
        self._call = call
        self._watch = watch
        self._patience = Patience(_nobody_waits)
        self._connection: Connection | None = None

    async def __aenter__(self) -> UpstreamResponse:
        patience = self._patience
        patience.wait(self._client.limits.first_byte_s)
        if self._watch is not None:
            self._watch(patience)
        try:
            self._connection = await self._client.answering(self._call, patience)
        except BaseException:
            patience.end()
            raise
        return _Response(self._connection, patience)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._patience.end()
        assert self._connection is not None
        if self._connection.end():
            self._client.pool.put(self._call.origin, self._connection)


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


def _nobody_waits() -> None:
    """Silence before there is anything to cut off."""


@lru_cache(maxsize=1024)
def origin_of(scheme: str, authority: str) -> Origin:
    url = URL.build(scheme=scheme, authority=authority, encoded=True)
    return Origin(url.raw_host or "", url.port or 0, scheme == "https", url.host_port_subcomponent or "")


def request_head(method: str, target: str, host: str, headers: CIMultiDict[str] | None, body: bytes | None) -> bytes:
    """Request line and headers. Raises ValueError for what would break out of its line, and for framing headers."""
    text, lines = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n", 3
    if headers:
        if any(name in headers for name in OWN_HEADERS):
            raise ValueError(f"the upstream client sets these headers itself: {', '.join(OWN_HEADERS)}")
        for name, value in headers.items():
            text += f"{name}: {value}\r\n"
        lines += len(headers)
    if body is not None or method in _WITH_BODY:
        text += f"Content-Length: {len(body or b'')}\r\n"
        lines += 1
    text += "\r\n"
    if not text.count("\n") == text.count("\r") == lines or "\0" in text:
        raise ValueError("a control character in a request line or header")
    return text.encode("utf-8", "surrogateescape")
