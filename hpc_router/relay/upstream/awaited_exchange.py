"""A connection to an upstream server, and the exchanges (request and response) on it that a task awaits.

The task sends the request, waits for the head, and then reads the body or has it written to a sink. The methods that
the event loop calls, and exchanges without a task, are in `connection`.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from hpc_router.errors import UpstreamError
from hpc_router.relay.stream_summary import StreamSummary
from hpc_router.relay.upstream.interface import Address, ResponseCallback, Sink, UpstreamTimeouts
from hpc_router.relay.upstream.response_parser import ResponseParser
from hpc_router.relay.upstream.timeouts import IdleTimer

if TYPE_CHECKING:
    from hpc_router.relay.upstream.connection import Connection

MAX_SINGLE_WRITE_BYTES: Final = 2**18
"""Maximum length in bytes of a request body that is sent in one write. A longer body is written in parts, which avoids
a copy and does not block the event loop."""


class Connections(Protocol):
    """The owner of connections to upstream servers, such as a connection pool."""

    def put(self, connection: "Connection") -> None:
        """Takes back a connection that may be used for another exchange."""

    def discard(self, connection: "Connection") -> None:
        """Forgets a connection that is closed. Called once per connection."""


class AwaitedExchange(asyncio.Protocol):
    """A connection whose exchanges (request and response) a task awaits. In each, the task calls `begin`, `send` and
    `wait_for_head`; then `stream_to`, or `chunk` until it returns nothing; at the end `Connection.end`."""

    __slots__ = (
        "_buffered_bytes", "_callback", "_chunk_ends", "_failure", "_loop", "_mark", "_owner", "_parser", "_reading",
        "_sent", "_sink", "_sink_full", "_summary", "_transport", "_waiter", "_writable", "_write_chunk", "address",
        "idle_s", "idle_timer", "nothing_received", "usable_until",
    )  # fmt: skip

    def __init__(self, owner: Connections, address: Address | str) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self.address = address
        self._transport: asyncio.Transport | None = None
        self._parser: ResponseParser | None = None
        self.idle_timer = IdleTimer(self.on_timeout)
        self.idle_s = 0.0
        self._sink: Sink | None = None  # receives the body data
        self._write_chunk: Callable[[bytes], bool] | None = None  # set at a chunk boundary: the sink's chunk writer
        self._chunk_ends: tuple[bytes, ...] = ()
        self._mark: bytes | None = None
        self._summary: StreamSummary | None = None
        self._sink_full = False  # the sink has to be drained
        self._buffered_bytes = 0
        self._reading = True
        self._writable = True
        self._sent = False
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._callback: ResponseCallback | None = None  # is notified of the response instead of a task
        self.nothing_received = False  # whether the last exchange ended without a byte of the response
        self.usable_until = 0.0  # in time.monotonic(), while the connection is in the pool; else 0

    def on_timeout(self) -> None:
        """Called when the idle timer has expired: makes the exchange fail with a timeout."""
        raise NotImplementedError

    def begin(self, limits: UpstreamTimeouts, *, head_only: bool) -> None:
        """Starts an exchange, and the timer for the first byte of its response. `head_only`: whether the response has
        no body, as after HEAD."""
        assert self._parser is None
        self._parser = ResponseParser(head_only=head_only)
        self.idle_s = limits.idle_s
        self.idle_timer.begin(limits.first_byte_s)
        self._failure, self._sent = None, False

    async def send(self, head: bytes, body: bytes | None) -> None:
        """Sends the request. Stops sending when the response starts before that; the connection is then not used
        again."""
        if self._transport is None:
            self._failure = UpstreamError("the replica had closed the connection")
        elif not body or len(body) <= MAX_SINGLE_WRITE_BYTES:
            self._transport.write(head + body if body else head)
            self._sent = True
        else:
            self._transport.write(head)
            await self._send_rest(memoryview(body))

    async def _send_rest(self, rest: memoryview) -> None:
        while rest:
            while not self._writable and not self._response_started:
                await self._wait_for_event()
            if self._response_started or self._transport is None:
                return
            self._transport.write(rest[:MAX_SINGLE_WRITE_BYTES])
            rest = rest[MAX_SINGLE_WRITE_BYTES:]
        self._sent = True

    @property
    def parser(self) -> ResponseParser:
        """The parser of this exchange's response."""
        assert self._parser is not None
        return self._parser

    async def wait_for_head(self) -> None:
        """Waits until status and headers of the response are received. Raises UpstreamError."""
        while not self.parser.status:
            self._raise_failure()
            await self._wait_for_event()

    def complete_body(self) -> bytes | None:
        """Returns the body if it is complete and in one chunk; else None."""
        parser = self._parser
        if parser is None or not parser.complete or len(parser.chunks) != 1 or self._failure is not None:
            return None
        return parser.chunks[0]

    async def chunk(self) -> bytes:
        """Waits for the next part of the body and returns it; empty at the end. Raises UpstreamError."""
        assert self._parser is not None
        while not self._parser.chunks:
            self._raise_failure()
            if self._parser.complete:
                return b""
            await self._wait_for_event()
        return self._take_buffered()

    async def stream_to(self, sink: Sink) -> None:
        """Writes the rest of the body to `sink`. Raises UpstreamError and what the sink raises."""
        assert self._parser is not None
        if self._sink_full:  # the sink became full before the task ran
            await self._drain(sink)
        while chunk := await self.chunk():
            self._sink_full = not sink.write(chunk)
            while not self._sink_full and not self._parser.complete and self._failure is None:
                self._sink = sink
                try:
                    await self._wait_for_event()
                finally:
                    self._sink = self._write_chunk = None
            if self._sink_full:
                await self._drain(sink)

    async def _drain(self, sink: Sink) -> None:
        self.idle_timer.pause()
        await sink.drain()
        self.idle_timer.restart(self.idle_s)

    @property
    def _response_started(self) -> bool:
        return self._failure is not None or (self._parser is not None and self._parser.status != 0)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wait_for_event(self) -> asyncio.Future[None]:
        """Returns a future that the next event of the connection completes. The exchange's task awaits it."""
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def _take_buffered(self) -> bytes:
        """Removes and returns the buffered body data. Restarts the idle timer, because data was received."""
        assert self._parser is not None
        self.idle_timer.restart(self.idle_s)
        chunks = self._parser.chunks
        if len(chunks) == 1:
            data = chunks.pop()
        else:
            data = b"".join(chunks)
            chunks.clear()
        self._buffered_bytes = 0
        if not self._reading:
            self._resume_reading()
        return data

    def _resume_reading(self) -> None:
        self._reading = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
