"""Interface of the HTTP client that router and agent use for their upstream servers.

There are two implementations, which pass the same tests: `client`, and the aiohttp reference in the tests. A response
body is either iterated (`chunks`) or written to a sink (`stream_to`). With a sink, an implementation can forward data
when it is received, without waking a task.
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
from hpc_router.relay.stream_summary import StreamSummary
from hpc_router.relay.upstream.timeouts import IdleTimer


@dataclass(frozen=True, slots=True)
class UpstreamTimeouts:
    """Timeouts in seconds: for making a connection, for the first byte of the response, and between two chunks of its
    body."""

    connect_s: float
    first_byte_s: float
    idle_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Address:
    """The address of an upstream server, made by `address_of`. Connections are pooled per `Address` object. `header`:
    value of the `Host` header. `base_path`: path of the server's URL; see `protocol.path_at`."""

    host: str
    port: int
    tls: bool
    header: bytes
    base_path: str


@lru_cache(maxsize=1024)
def address_of(url: str) -> Address:
    """Returns the address of an http or https URL."""
    parts = URL(url)
    header = (parts.host_port_subcomponent or "").encode()
    return Address(parts.raw_host or "", parts.port or 0, parts.scheme == "https", header, parts.raw_path.rstrip("/"))


def request_line(method: str, address: Address, target: str) -> bytes:
    """Returns the request line and the `Host` header line. Raises ValueError for a target that would end the request
    line."""
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
"""Maximum length in characters of a target whose request line is cached."""
CHUNK_END: Final = b"\r\n"
"""The line break that ends a chunk of HTTP/1.1."""
CHUNK_ENDS: Final = (CHUNK_END,)


class ChunkWriter(NamedTuple):
    """A function, `write`, that forwards one complete HTTP/1.1 chunk including its framing; it behaves like
    `Sink.write`.

    It may be called only for a chunk that ends with one of `ends` (each includes the chunk's final line break) and does
    not contain `mark`. `summary`: counts each forwarded chunk as one event; None: nothing is counted.
    """

    write: Callable[[bytes], bool]
    ends: tuple[bytes, ...]
    mark: bytes | None = None
    summary: StreamSummary | None = None


class Sink(Protocol):
    """A receiver of a response body. If one of its methods raises an exception, the exchange ends and `stream_to`
    raises that exception."""

    def write(self, data: bytes) -> bool:
        """Accepts a part of the body without blocking. Returns False if `drain` must be called before the next
        `write`."""

    def chunk_writer(self) -> ChunkWriter | None:
        """Called after a `write`. Returns a writer for the following chunks, which may be used until the next `write`
        or `drain`; None if all data must go to `write`."""

    async def drain(self) -> None:
        """Waits until the sink accepts more data. The upstream's idle timer is paused meanwhile."""


class UpstreamResponse:
    """The response of an upstream server: status and headers, then the body in chunks. `length`: length of the body in
    bytes; None if it is unknown. `headers` may lack `Content-Length`."""

    def __init__(self, status: int, headers: Headers, length: int | None) -> None:
        self.status = status
        self.headers = headers
        self.length = length

    @property
    def content_type(self) -> bytes:
        """The media type of the response, without parameters and in lower case."""
        return self.headers.content_type

    @property
    def complete_body(self) -> bytes | None:
        """The body, if it is short and was received together with the head; else None."""
        return None

    def chunks(self) -> AsyncIterator[bytes]:
        """Yields the parts of the body. Raises UpstreamError or UpstreamTimeoutError if the response ends early."""
        raise NotImplementedError

    async def stream_to(self, sink: Sink) -> None:
        """Writes the body to `sink`. Raises what `chunks` and the sink raise."""
        async for chunk in self.chunks():
            if not sink.write(chunk):
                await sink.drain()

    async def read(self, limit: int) -> bytes:
        """Returns the complete body. Raises UpstreamError if the body is longer than `limit` bytes."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise UpstreamError(f"the replica's response is longer than {limit} bytes")
        return bytes(body)


class ResponseCallback(ABC):
    """Receives the response to a request that was sent by `Upstream.start`, so that no task awaits it."""

    __slots__ = ()

    @abstractmethod
    def on_response(self, status: int, headers: Headers, body: bytes) -> bool:
        """Called with a complete response that was received in one read. Returns whether the callback accepts it; if
        not, `on_head` is called next."""

    def on_head(self, status: int, headers: Headers) -> "Sink | None":
        """Called with the head of a response. Returns the sink for its body; None if the response needs a task: then
        `on_incomplete` is called next."""
        return None

    def on_end(self) -> None:
        """Called when the sink has received the complete body. If this raises an error, `on_incomplete` is called
        next."""
        raise NotImplementedError

    @abstractmethod
    def on_incomplete(self) -> None:
        """Called if the callback does not accept the response, if the sink is full, or if the exchange has failed.
        Starts a task, which calls `Upstream.request` with this request as `started`."""


class PendingRequest(Protocol):
    """A request that has been sent and that no task awaits yet."""

    idle_timer: IdleTimer

    def cancel(self) -> None:
        """Aborts the request."""


class Upstream(Protocol):
    """An HTTP client that pools its connections between requests. A change of `limits` applies to later requests."""

    limits: UpstreamTimeouts

    def start(
        self, address: Address, message: bytes, callback: ResponseCallback, limits: UpstreamTimeouts | None = None
    ) -> PendingRequest | None:
        """Sends a complete request, from its `request_line` to its body, at once over a pooled connection. `callback`
        gets the response. Returns None and sends nothing if no connection is pooled or the message is long. `limits`
        replace those of the client."""

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
        """Returns a context manager that sends a request and yields its response.

        Raises UpstreamConnectError, UpstreamTimeoutError or UpstreamError, also from within the block.

        `target`: path and query. `head`: header lines, without those for framing (see `headers.lines`). `watch` is
        called with the idle timer of each connection that is tried, so that its timeout can be shortened when the
        replica is lost. `started`: a request that `start` returned, to continue it. `limits` replace the client's own,
        except for `connect_s`.

        If the block is left early, the connection is closed, which tells the engine that the client has disconnected.
        """
