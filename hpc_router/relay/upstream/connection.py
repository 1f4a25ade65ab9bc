"""One connection to an upstream server, with one exchange (request and response) after another.

Received bytes are parsed at once. Body data goes to the exchange's sink in the same step; without a sink it is buffered
until the task reads it, and the connection stops reading when the buffer is full. A failure is stored, and raised in
the task once the data received before it is read.

An exchange may also be started without a task. Then a `ResponseCallback` gets the complete response, or the head and
later the end; if it accepts neither, it starts a task that continues the request.
"""

import asyncio
from typing import Final, cast

from hpc_router.errors import UpstreamError, UpstreamTimeoutError
from hpc_router.relay.upstream.awaited_exchange import AwaitedExchange
from hpc_router.relay.upstream.interface import PendingRequest, ResponseCallback, UpstreamTimeouts
from hpc_router.relay.upstream.response_parser import ResponseParser, cached_response, chunk_prefix

MAX_BUFFERED_BYTES: Final = 2**16
"""Number of buffered body bytes above which the connection stops reading. One more read may already be under way."""


class Connection(AwaitedExchange, PendingRequest):
    """A connection to one upstream server. An exchange on it is driven by a task or by callbacks.

    An exchange in a task follows the steps of `AwaitedExchange`, and always ends with `end` or `finish`. `start` begins
    an exchange by callbacks: its `ResponseCallback` either takes the response, which ends the exchange, or declines it;
    then a task continues with `wait_for_head`.
    """

    __slots__ = ()

    @property
    def usable(self) -> bool:
        """Whether the connection is open."""
        transport = self._transport
        return transport is not None and not transport.is_closing()

    def exchange_age_s(self) -> float:
        """Returns the seconds since the start of the current or last exchange."""
        return self._loop.time() - self.idle_timer.started_at

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # Called by the exchange.

    def start(self, request: bytes, callback: ResponseCallback, limits: UpstreamTimeouts) -> None:
        """Starts an exchange without a task, over a pooled connection. `request`: the complete, short request."""
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

    def end(self) -> bool:
        """Ends the exchange. Returns whether the connection can be used again; if not, the connection is closed."""
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
        """Ends the exchange as `end` does, and returns a usable connection to the pool."""
        if self.end():
            self._owner.put(self)

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
            if (summary := self._summary) is not None:
                summary.unread += 1
                summary.last = data
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
                self.abort()  # the server sent data without a request
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
                        self._write_chunk, self._chunk_ends, self._mark, self._summary = chunk_writer
                    return
                self._sink = None
                if callback is not None and not self._sink_full:
                    callback.on_end()
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
        """Returns whether the response is complete and `callback` has accepted it; the exchange has then ended."""
        if not parser.complete or len(parser.chunks) != 1:
            return False
        if not callback.on_response(parser.status, parser.headers, parser.chunks[0]):
            return False
        self._callback = None
        self.finish()
        return True

    def _ensure_parser(self) -> None:
        """Creates the parser of an exchange that was started without a task and now needs a parser."""
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
