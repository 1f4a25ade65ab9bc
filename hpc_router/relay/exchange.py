"""What router and agent ask of the upstream side, whoever implements it.

Two implementations stand behind these types and pass the same tests: `upstream`, which serves, and `upstream_aiohttp`,
the reference it is compared with. A body is either iterated (`chunks`) or poured into a sink (`flow`); the second lets
an implementation hand a piece on the moment it has come, without waking a task.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from hpc_router.errors import UpstreamError
from hpc_router.relay.patience import Patience


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds to wait: for a connection, for the first byte of the answer, between two chunks."""

    connect_s: float
    first_byte_s: float
    idle_s: float


class Sink(Protocol):
    """Where a body goes. What either method raises ends the exchange and comes out of `flow`."""

    def take(self, data: bytes) -> bool:
        """Never blocks. False: nothing more before `make_room` has returned."""

    async def make_room(self) -> None:
        """Until more may come. However long that takes, the upstream does not count as silent meanwhile."""


class UpstreamResponse:
    """Status and headers, then the body in chunks as they come."""

    def __init__(self, status: int, headers: CIMultiDictProxy[str]) -> None:
        self.status = status
        self.headers = headers
        self.content_type = headers.get("content-type", "").partition(";")[0].strip().lower()

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


class Upstream(Protocol):
    """Connections to upstream servers, kept between requests."""

    def request(
        self,
        method: str,
        url: URL,
        *,
        headers: CIMultiDict[str] | None = None,
        body: bytes | None = None,
        watch: Callable[[Patience], None] | None = None,
    ) -> AbstractAsyncContextManager[UpstreamResponse]:
        """Raises UpstreamConnectError, UpstreamTimeoutError or UpstreamError, also from within the block.

        Leaving the block early closes the connection at once: that is how an engine learns that its client has gone.
        `watch` is given the request's patience, for whoever learns that the upstream is lost.
        """
