"""One request to an upstream server, and its response, for a task that awaits them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from hpc_router.relay.upstream.connection import Connection
from hpc_router.relay.upstream.interface import Address, Sink, UpstreamResponse, UpstreamTimeouts
from hpc_router.relay.upstream.timeouts import IdleTimer

if TYPE_CHECKING:
    from hpc_router.relay.upstream.client import UpstreamClient


class Exchange(AbstractAsyncContextManager[UpstreamResponse]):
    """Sends one request when it is entered as a context manager, and yields the response."""

    __slots__ = ("_client", "_connection", "address", "body", "head", "head_only", "limits", "started", "watch")

    def __init__(
        self,
        client: "UpstreamClient",
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
        self.started = started  # the connection over which the request has already been sent
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
