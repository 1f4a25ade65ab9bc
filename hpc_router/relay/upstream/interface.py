"""What router and agent ask of the upstream side, whoever implements it.

Two implementations stand behind these types and pass the same tests: `upstream`, which serves, and `upstream_aiohttp`,
the reference it is compared with. A body is either iterated (`chunks`) or poured into a sink (`flow`); the second lets
an implementation hand a piece on the moment it has come, without waking a task.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from yarl import URL

from hpc_router.errors import UpstreamError
from hpc_router.relay.headers import Headers
from hpc_router.relay.upstream.timeouts import IdleTimer


@dataclass(frozen=True, slots=True)
class UpstreamTimeouts:
    """Seconds to wait: for a connection, for the first byte of the answer, between two chunks."""

    connect_s: float
    first_byte_s: float
    idle_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Address:
    """Where an upstream server is; made by `address_of`. Connections are kept per object.

    `header` is its `Host`; `prefix` comes before every path.
    """

    host: str
    port: int
    tls: bool
    header: bytes
    prefix: str


@lru_cache(maxsize=1024)
def address_of(url: str) -> Address:
    """The one of an http or https URL."""
    parts = URL(url)
    header = (parts.host_port_subcomponent or "").encode()
    return Address(parts.raw_host or "", parts.port or 0, parts.scheme == "https", header, parts.raw_path.rstrip("/"))


CHUNK_END: Final = b"\r\n"
CHUNK_ENDS: Final = (CHUNK_END,)


class ChunkWriter(NamedTuple):
    """Where a piece of a body that is one whole chunk of HTTP/1.1 may go in its framing, if it ends with one of `ends`
    (each of them with a line break) and does not contain `mark`. `write` is as `Sink.take`."""

    write: Callable[[bytes], bool]
    ends: tuple[bytes, ...]
    mark: bytes | None = None


class Sink(Protocol):
    """Where a body goes. What its methods raise ends the exchange and comes out of `flow`."""

    def take(self, data: bytes) -> bool:
        """Never blocks. False: nothing more before `make_room` has returned."""

    def passage(self) -> ChunkWriter | None:
        """A shorter way for what comes until the next `take` or `make_room`; asked after a `take`."""

    async def make_room(self) -> None:
        """Until more may come. However long that takes, the upstream does not count as silent meanwhile."""


class UpstreamResponse:
    """Status and headers, then the body in chunks as they come. `length` of the body: None where the head is silent.
    The headers may lack the one that tells it."""

    def __init__(self, status: int, headers: Headers, length: int | None) -> None:
        self.status = status
        self.headers = headers
        self.length = length

    @property
    def content_type(self) -> bytes:
        """Without its parameters, in lower case."""
        return self.headers.content_type

    @property
    def whole(self) -> bytes | None:
        """The whole body, when it has come with the head and was short."""
        return None

    def chunks(self) -> AsyncIterator[bytes]:
        """Raises UpstreamError or UpstreamTimeoutError where the answer breaks off."""
        raise NotImplementedError

    async def flow(self, sink: Sink) -> None:
        """The whole body into `sink`; raises what `chunks` and the sink raise."""
        async for chunk in self.chunks():
            if not sink.take(chunk):
                await sink.make_room()

    async def read(self, limit: int) -> bytes:
        """The whole body; raises UpstreamError when it is longer than `limit` bytes."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise UpstreamError(f"the replica's answer is longer than {limit} bytes")
        return bytes(body)


class ResponseCallback(ABC):
    """Who waits without a task for the answer to what `Upstream.start` has sent. It hears once, or is handed over."""

    __slots__ = ()

    @abstractmethod
    def on_answer(self, status: int, headers: Headers, body: bytes) -> bool:
        """All of the answer came at once. False: it is not to be taken so; `on_news` follows."""

    @abstractmethod
    def on_news(self) -> None:
        """The first of the answer has come, or there will be none: a `request` has to go on with it."""


class PendingRequest(Protocol):
    """A request that was sent and that no task waits for yet."""

    patience: IdleTimer

    def abandon(self) -> None:
        """Nobody wants its answer any more."""


class Upstream(Protocol):
    """Connections to upstream servers, kept between requests. `limits` hold for what begins from then on."""

    limits: UpstreamTimeouts

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
    ) -> PendingRequest | None:
        """Send a request at once, if a connection is kept for it. `limits`: other than the client's own."""

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

        `target`: path and query; `head`: header lines but for those of framing (see `headers.lines`). Leaving the block
        early closes the connection at once: that is how an engine learns that its client has gone. `watch` is given
        the patience that is had with the upstream, at each attempt, for whoever learns that it is lost. `started`: the
        same request, as far as `start` has brought it. `limits`: other than the client's own, but for the connection.
        """
