"""Interface of the HTTP client that router and agent use for their upstream servers.

Two implementations pass the same tests: `client`, and the aiohttp reference in the tests. A response body is either
iterated (`chunks`) or written to a sink (`stream_to`). With a sink, an implementation can forward data when it is
received, without waking a task.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from yarl import URL

from hpc_router.errors import UpstreamError
from hpc_router.net.protocol import path_at
from hpc_router.relay.headers import Headers
from hpc_router.relay.upstream.timeouts import IdleTimer


@dataclass(frozen=True, slots=True)
class UpstreamTimeouts:
    """Seconds to wait for a connection, for the first byte of the response, and between two chunks."""

    connect_s: float
    first_byte_s: float
    idle_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Address:
    """Address of an upstream server, made by `address_of`. Connections are pooled per object.

    `header`: the `Host` header. `base_path`: path of the URL; see `protocol.path_at`.
    """

    host: str
    port: int
    tls: bool
    header: bytes
    base_path: str


@lru_cache(maxsize=1024)
def address_of(url: str) -> Address:
    """The address of an http or https URL."""
    parts = URL(url)
    header = (parts.host_port_subcomponent or "").encode()
    return Address(parts.raw_host or "", parts.port or 0, parts.scheme == "https", header, parts.raw_path.rstrip("/"))


def request_line(method: str, address: Address, target: str) -> bytes:
    """Request line and `Host` header. Raises ValueError for a target that would end the request line."""
    return (_cached_request_line if len(target) <= _SHORT_TARGET else _cached_request_line.__wrapped__)(
        method, address, target
    )


@lru_cache(maxsize=512)
def _cached_request_line(method: str, address: Address, target: str) -> bytes:
    if not target.isascii() or not target.isprintable() or " " in target:
        raise ValueError("a request target holds printable ASCII without spaces")
    path = path_at(address.base_path, target)
    return b"%b\r\nhost: %b\r\n" % (f"{method} {path} HTTP/1.1".encode(), address.header)


_SHORT_TARGET: Final = 256
"""Characters; the request lines of longer targets are not cached."""
CHUNK_END: Final = b"\r\n"
CHUNK_ENDS: Final = (CHUNK_END,)


class ChunkWriter(NamedTuple):
    """Forwards one complete HTTP/1.1 chunk including its framing, if the chunk ends with one of `ends` (each with the
    final line break) and does not contain `mark`. `write` behaves like `Sink.write`."""

    write: Callable[[bytes], bool]
    ends: tuple[bytes, ...]
    mark: bytes | None = None


class Sink(Protocol):
    """Receives a body. An exception of its methods ends the exchange and is raised by `stream_to`."""

    def write(self, data: bytes) -> bool:
        """Never blocks. False: call `drain` before the next `write`."""

    def chunk_writer(self) -> ChunkWriter | None:
        """Writer for the chunks until the next `write` or `drain`. Called after a `write`."""

    async def drain(self) -> None:
        """Wait until the sink accepts more. The upstream's idle timer is paused meanwhile."""


class UpstreamResponse:
    """Status and headers, then the body in chunks. `length`: of the body, None if unknown; `headers` may lack
    `Content-Length`."""

    def __init__(self, status: int, headers: Headers, length: int | None) -> None:
        self.status = status
        self.headers = headers
        self.length = length

    @property
    def content_type(self) -> bytes:
        """Without parameters, in lower case."""
        return self.headers.content_type

    @property
    def complete_body(self) -> bytes | None:
        """The body, if it is short and was received together with the head."""
        return None

    def chunks(self) -> AsyncIterator[bytes]:
        """Raises UpstreamError or UpstreamTimeoutError if the response ends early."""
        raise NotImplementedError

    async def stream_to(self, sink: Sink) -> None:
        """Write the body to `sink`. Raises what `chunks` and the sink raise."""
        async for chunk in self.chunks():
            if not sink.write(chunk):
                await sink.drain()

    async def read(self, limit: int) -> bytes:
        """The complete body. Raises UpstreamError if it is longer than `limit` bytes."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise UpstreamError(f"the replica's response is longer than {limit} bytes")
        return bytes(body)


class ResponseCallback(ABC):
    """Notified of the response to `Upstream.start`, which no task awaits."""

    __slots__ = ()

    @abstractmethod
    def on_response(self, status: int, headers: Headers, body: bytes) -> bool:
        """The complete response was received in one read. False: not accepted; `on_head` is called next."""

    def on_head(self, status: int, headers: Headers) -> "Sink | None":
        """The head was received. Returns what gets the body; None: `on_incomplete` is called next."""
        return None

    def on_end(self) -> None:
        """The sink got the complete body. `on_incomplete` is called next if this raises an error."""
        raise NotImplementedError

    @abstractmethod
    def on_incomplete(self) -> None:
        """The response has to be awaited from here on: the callback takes no more of it, the sink is full, or the
        exchange has failed. Call `request` with `started` to continue in a task."""


class PendingRequest(Protocol):
    """A request that was sent and that no task awaits yet."""

    idle_timer: IdleTimer

    def cancel(self) -> None:
        """Abort the request."""


class Upstream(Protocol):
    """Connections to upstream servers, pooled between requests. A change of `limits` applies to later requests."""

    limits: UpstreamTimeouts

    def start(
        self, address: Address, message: bytes, callback: ResponseCallback, limits: UpstreamTimeouts | None = None
    ) -> PendingRequest | None:
        """Send a complete request, from its `request_line` to its body, at once over a pooled connection. Returns None,
        and sends nothing, if no connection is pooled or the message is long. `limits` replace those of the client."""

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
    ) -> AbstractAsyncContextManager[UpstreamResponse]:
        """Raises UpstreamConnectError, UpstreamTimeoutError or UpstreamError, also from within the block.

        `target`: path and query. `head`: header lines without those of framing (see `headers.lines`). Leaving the block
        early closes the connection, which tells the engine that the client has disconnected. `watch` gets the idle
        timer of each attempt, so that it can be tightened when the replica is lost. `started`: the request as returned
        by `start`, to continue it. `limits` replace the client's own, except for `connect_s`.
        """
