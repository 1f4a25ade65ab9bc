"""One connection to an upstream server: one exchange (request and response) after another.

Received bytes are parsed at once. Body data goes to the exchange's sink in the same step, or is buffered until the task
reads it; the connection stops reading when the buffer is full. A failure is stored and raised in the task, after the
data received before it. An exchange may also be started without a task: then a callback gets the complete response, or
its head and later its end, or is asked to continue in a task.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, cast

from hpc_router.errors import UpstreamError, UpstreamTimeoutError
from hpc_router.relay.upstream.interface import Address, PendingRequest, ResponseCallback, Sink, UpstreamTimeouts
from hpc_router.relay.upstream.response_parser import ResponseParser, cached_response, chunk_prefix
from hpc_router.relay.upstream.timeouts import IdleTimer

MAX_BUFFERED_BYTES: Final = 2**16
"""Buffered body bytes above which the connection stops reading; one more read may be under way."""
MAX_SINGLE_WRITE_BYTES: Final = 2**18
"""A longer request body is written in parts, which avoids a copy and does not block the event loop."""


class Connections(Protocol):
    """The owner of a connection."""

    def put(self, connection: "Connection") -> None:
        """The connection may be used for another exchange."""

    def discard(self, connection: "Connection") -> None:
        """The connection is closed. Called once."""


class Connection(asyncio.Protocol, PendingRequest):
    """With a task: `begin`, `send`, `wait_for_head`, then `chunk` until it is empty or `stream_to`, and always `end`.

    Without a task: `start`; an accepted response ends the exchange, otherwise a task continues at `wait_for_head`.
    """

    __slots__ = (
        "_buffered_bytes", "_callback", "_chunk_ends", "_failure", "_loop", "_mark", "_owner", "_parser", "_reading",
        "_sent", "_sink", "_sink_full", "_transport", "_waiter", "_writable", "_write_chunk", "address", "idle_s",
        "idle_timer", "nothing_received", "usable_until",
    )  # fmt: skip

    def __init__(self, owner: Connections, address: Address | str) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self.address = address
        self._transport: asyncio.Transport | None = None
        self._parser: ResponseParser | None = None
        self.idle_timer = IdleTimer(self.on_timeout)
        self.idle_s = 0.0
        self._sink: Sink | None = None  # gets the body data
        self._write_chunk: Callable[[bytes], bool] | None = None  # of the sink's chunk writer, at a chunk boundary
        self._chunk_ends: tuple[bytes, ...] = ()
        self._mark: bytes | None = None
        self._sink_full = False  # the sink has to be drained
        self._buffered_bytes = 0
        self._reading = True
        self._writable = True
        self._sent = False
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._callback: ResponseCallback | None = None  # notified instead of a task
        self.nothing_received = False  # in the last exchange
        self.usable_until = 0.0  # time.monotonic(), while the connection is idle

    @property
    def usable(self) -> bool:
        transport = self._transport
        return transport is not None and not transport.is_closing()

    def exchange_age_s(self) -> float:
        """Seconds since the start of the current or last exchange."""
        return self._loop.time() - self.idle_timer.started_at

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # Called by the exchange.

    def begin(self, limits: UpstreamTimeouts, *, head_only: bool) -> None:
        """Start an exchange and the timer for the first byte of the response."""
        assert self._parser is None
        self._parser = ResponseParser(head_only=head_only)
        self.idle_s = limits.idle_s
        self.idle_timer.begin(limits.first_byte_s)
        self._failure, self._sent = None, False

    async def send(self, head: bytes, body: bytes | None) -> None:
        """Send the request. A response that starts before the end of it stops the sending and later closes the
        connection."""
        if self._transport is None:
            self._failure = UpstreamError("the replica had closed the connection")
        elif not body or len(body) <= MAX_SINGLE_WRITE_BYTES:
            self._transport.write(head + body if body else head)
            self._sent = True
        else:
            self._transport.write(head)
            await self._send_rest(memoryview(body))

    def start(self, request: bytes, callback: ResponseCallback, limits: UpstreamTimeouts) -> None:
        """Start an exchange without a task, over a pooled connection. `request` is short."""
        assert self._transport is not None
        self._callback = callback
        self.idle_s = limits.idle_s
        self.idle_timer.begin(limits.first_byte_s)
        self._transport.write(request)
        self._sent = True

    def cancel(self) -> None:
        self._callback = self._sink = self._write_chunk = None
        parser, self._parser = self._parser, None
        if parser is not None:
            parser.release()
        self.idle_timer.pause()
        self.abort()

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
        """Wait until status and headers are known."""
        while not self.parser.status:
            self._raise_failure()
            await self._wait_for_event()

    def complete_body(self) -> bytes | None:
        """The body, if it is complete and in one chunk."""
        parser = self._parser
        if parser is None or not parser.complete or len(parser.chunks) != 1 or self._failure is not None:
            return None
        return parser.chunks[0]

    async def chunk(self) -> bytes:
        """The next part of the body; empty at the end."""
        assert self._parser is not None
        while not self._parser.chunks:
            self._raise_failure()
            if self._parser.complete:
                return b""
            await self._wait_for_event()
        return self._take_buffered()

    async def stream_to(self, sink: Sink) -> None:
        """Write the rest of the body to `sink`."""
        assert self._parser is not None
        if self._sink_full:  # since before the task ran
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

    def end(self) -> bool:
        """End the exchange. Returns whether the connection can be used again; if not, it is closed."""
        assert self._parser is not None
        parser, self._parser = self._parser, None
        self.idle_timer.pause()
        self.nothing_received = parser.nothing_received
        self._sink_full, self._buffered_bytes = False, 0
        parser.release()
        reusable = parser.complete and parser.keep_alive and self._sent and self._failure is None and self.usable
        if not reusable:
            self.abort()
        elif not self._reading:
            self._resume_reading()
        return reusable

    def finish(self) -> None:
        """`end`, and return a usable connection to the pool."""
        if self.end():
            self._owner.put(self)

    @property
    def _response_started(self) -> bool:
        return self._failure is not None or (self._parser is not None and self._parser.status != 0)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wait_for_event(self) -> asyncio.Future[None]:
        """A future that the next event of the connection completes. Awaited by the exchange's task."""
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def _take_buffered(self) -> bytes:
        """Remove and return the buffered body data. Restarts the idle timer, because data was received."""
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
        if self.usable:
            assert self._transport is not None
            self._transport.resume_reading()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        write, mark = self._write_chunk, self._mark
        if (
            write is not None
            and data.startswith(chunk_prefix(len(data)))
            and data.endswith(self._chunk_ends)
            and (mark is None or data.rfind(mark) < 0)  # rfind is twice as fast as `in`
        ):
            self.idle_timer.activity = True  # the usual case of a stream: one event per chunk and read
            try:
                if write(data):
                    return
                self._sink_full = True
            except Exception as error:  # noqa: BLE001  # raised in the task
                self._fail(error)
            self._sink = self._write_chunk = None
            self._wake()
            return
        parser, callback = self._parser, self._callback
        if parser is None:
            if callback is None:
                self.abort()  # data without a request
                return
            cached = cached_response(data)
            if cached is not None and callback.on_response(cached[0].status, cached[0].headers, cached[1]):
                self._callback = None
                self.idle_timer.pause()
                if cached[0].keep_alive:
                    self._owner.put(self)
                else:
                    self.abort()
                return
            parser = self._parser = ResponseParser()
        sink, self._write_chunk = self._sink, None
        try:
            parser.feed(data)
            if callback is not None and sink is None:
                if not parser.status:
                    return  # only a part of the head was received
                if self._accepted(callback, parser):
                    return
                sink = self._sink = callback.on_head(parser.status, parser.headers)
            if sink is not None:
                self._sink_full = bool(parser.chunks) and not sink.write(self._take_buffered())
                if not self._sink_full and not parser.complete:
                    if parser.at_chunk_boundary and (chunk_writer := sink.chunk_writer()) is not None:
                        self._write_chunk, self._chunk_ends, self._mark = chunk_writer
                    return
                self._sink = None
                if callback is not None and not self._sink_full and callback.on_end():
                    self._callback = None
                    self.finish()
                    return
        except Exception as error:  # noqa: BLE001  # raised in the task
            self._fail(error)
        if parser.chunks and self._sink is None:
            self._buffered_bytes += len(data)
            if self._buffered_bytes > MAX_BUFFERED_BYTES and self._reading and self.usable:
                assert self._transport is not None
                self._reading = False
                self._transport.pause_reading()
        self._wake()

    def _accepted(self, callback: ResponseCallback, parser: ResponseParser) -> bool:
        """Whether the response is complete and the callback has taken it."""
        if not parser.complete or len(parser.chunks) != 1:
            return False
        if not callback.on_response(parser.status, parser.headers, parser.chunks[0]):
            return False
        self._callback = None
        self.finish()
        return True

    def _ensure_parser(self) -> None:
        """The exchange was started without a task and needs a parser now."""
        if self._callback is not None and self._parser is None:
            self._parser = ResponseParser()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.idle_timer.end()
        self._owner.discard(self)
        self._ensure_parser()
        if self._parser is not None and not self._parser.complete and self._failure is None:
            try:
                if error is not None:
                    raise UpstreamError(f"the connection to the replica broke: {type(error).__name__}") from error
                self._parser.feed_eof()
            except UpstreamError as failure:
                self._failure = failure
        self._wake()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self.abort()

    def on_timeout(self) -> None:
        self._ensure_parser()
        self._fail(UpstreamTimeoutError("the replica sent nothing within the timeout"))
        self._wake()

    def _wake(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            self._sink = self._write_chunk = None
            callback.on_incomplete()
            return
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
