"""Relays one upstream response to one client and commits it as late as possible.

A response is committed once the client has received any of it; until then the request can be retried on another
replica. Nothing is sent before the first body byte, except the head and comments of an `EarlyStream`, and a response
that is not streamed is buffered until it is complete. After the commit, only complete events are sent; a comment keeps
the connection alive when the stream pauses. The client can always see a later failure: as an error event in an event
stream, otherwise as an aborted connection.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hpc_router.errors import UpstreamAbortedError, UpstreamError
from hpc_router.relay.aborted_responses import AbortDetector, UnbufferedAbortDetector, ends_stream
from hpc_router.relay.downstream.interface import SHORT_BYTES, DownstreamGoneError, Request, Response
from hpc_router.relay.early_stream import EarlyStream
from hpc_router.relay.sse import (
    CONTENT_TYPE,
    EVENT_ENDS,
    PING,
    EventSplitter,
    EventTooLargeError,
    UnfinishedEventError,
)
from hpc_router.relay.stream_summary import StreamSummary, stated_usage
from hpc_router.relay.upstream.interface import CHUNK_END, ChunkWriter, UpstreamResponse

_EVENT_CHUNK_ENDS: Final = tuple(b"}" + end + CHUNK_END for end in EVENT_ENDS)
"""The ends of the chunks that are forwarded without being looked at: events whose data are a JSON object. `[DONE]` is
none, so `EventStream` sees it."""


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """The limits of a relayed response.

    `buffer_bytes`: maximum number of buffered bytes of a response that is not streamed. `write_s`: maximum time in
    seconds for which a client may read nothing. `ping_s`: pause of a stream, in seconds, after which a comment is sent.
    """

    buffer_bytes: int
    write_s: float
    ping_s: float


class ResponseRelay:
    """Relays the upstream's response to the client of `request`. `response`: the complete response, which the handler
    of `request` returns; None if the response was streamed to the client.

    `abort_detector`: the detector of the request's API. `stream`: whether the request asks for a stream; a body of
    unknown length is then not buffered, whatever its content type. Events that the upstream has compressed are relayed
    like any other body. `summary`: gets what is needed to count the response's tokens; None: they are not counted.
    `early`: may have sent the head of a stream; if the response then is no event stream, it is not sent but stored in
    `response`. `on_start` is called before the first event of a stream is sent.
    """

    __slots__ = (
        "_abort_detector", "_early", "_limits", "_on_start", "_request", "_stream", "_summary", "events", "response",
        "status",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        limits: RelayLimits,
        abort_detector: type[AbortDetector],
        *,
        stream: bool,
        summary: StreamSummary | None = None,
        early: EarlyStream | None = None,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        self._summary = summary
        self._early = early
        self._on_start = on_start
        self._request = request
        self._limits = limits
        self._abort_detector = abort_detector
        self._stream = stream
        self.events: EventStream | None = None
        self.status = 0
        self.response: Response | None = None

    @property
    def committed(self) -> bool:
        """Whether the response can no longer be replaced by that of another replica."""
        if self._early is not None and self._early.started and (self.events is None or not self.events.started):
            return self.response is not None
        return self.response is not None or self._request.response_started

    async def relay(self, upstream: UpstreamResponse, head: bytes) -> None:
        """Relays all of the upstream's response. `head`: the header lines for the client. Raises DownstreamGoneError,
        UpstreamAbortedError, and the errors of `UpstreamResponse.stream_to`."""
        if upstream.content_type == CONTENT_TYPE and b"content-encoding" not in upstream.headers:
            self.begin_events(upstream.status, head)
            await self.relay_events(upstream)
            return
        self.status = upstream.status
        if self._early is not None:
            self._early.stop()
            if self._early.started:
                self.response = Response(self.status, head, await upstream.read(self._limits.buffer_bytes))
                return
        whole = upstream.complete_body
        if whole is not None and len(whole) <= SHORT_BYTES:
            self._abort_detector().check_body(whole)
            self._summarise(whole)
            self.response = Response(self.status, head, whole)
            return
        unbuffered = self._stream and upstream.length is None and 200 <= self.status < 300
        body = _BufferedBody(
            self._request, self.status, head, self._limits, buffer_bytes=0 if unbuffered else self._limits.buffer_bytes
        )
        await upstream.stream_to(body)
        if self._request.response_started:
            return
        self._abort_detector().check_body(body.buffered)
        self._summarise(body.buffered)
        if len(body.buffered) <= SHORT_BYTES:
            self.response = Response(self.status, head, bytes(body.buffered))
        else:  # the reservation ends only when the client has read most of it
            body.length = len(body.buffered)
            await body.drain()

    def begin_events(self, status: int, head: bytes) -> "EventStream":
        """Sends the head of a stream, and returns the sink for its events. The caller then ends the stream with
        `end_events`, or has the rest relayed by `relay_events`."""
        self.status = status
        if self._summary is not None:
            self._summary.streamed = True
        self.events = EventStream(
            self._request,
            status,
            head,
            self._limits,
            self._abort_detector(),
            self._summary,
            self._early,
            self._on_start,
        )
        return self.events

    def _summarise(self, body: bytes | bytearray) -> None:
        if self._summary is not None and self._summary.accepted:
            self._summary.usage = stated_usage(body)

    def end_events(self) -> None:
        """Ends the stream after the upstream body has ended without an error. Raises the same errors as `relay`."""
        assert self.events is not None
        self.events.stop_pings()
        self.events.end()

    async def relay_events(self, upstream: UpstreamResponse) -> None:
        """Relays the remaining events and ends the stream. Raises the same errors as `relay`. A failure after the final
        event is ignored, because the client has the complete response."""
        assert self.events is not None
        try:
            await upstream.stream_to(self.events)
            self.events.end()
        except UpstreamError as error:
            if isinstance(error, UpstreamAbortedError) or not self.events.final:
                raise
        finally:
            self.events.stop_pings()

    async def end_with_error(self, event: bytes) -> None:
        """Ends a committed response that cannot be completed. `event`: the error as an event, which is sent if the
        response is an event stream; otherwise the connection is aborted."""
        if self.events is None:
            self._request.abort()
        elif not self._request.write(event):
            await self._request.drain(limit_s=self._limits.write_s)


class _BufferedBody:
    """A sink that buffers up to `buffer_bytes` bytes. A longer body is sent to the client, which commits the
    response."""

    def __init__(self, request: Request, status: int, head: bytes, limits: RelayLimits, *, buffer_bytes: int) -> None:
        self._request = request
        self._head = status, head
        self._limits = limits
        self._buffer_bytes = buffer_bytes
        self._detector = UnbufferedAbortDetector()
        self.buffered = bytearray()
        self.length: int | None = None  # known once the body is complete

    def write(self, data: bytes) -> bool:
        if self._request.response_started:
            self._detector.check(data)
            return self._request.write(data)
        self.buffered += data
        return len(self.buffered) <= self._buffer_bytes

    def chunk_writer(self) -> None:
        """Returns None, so that all data comes to `write`, which searches it for the mark of an abort."""

    async def drain(self) -> None:
        if not self._request.response_started:
            buffered = bytes(self.buffered)
            if self.length is None:
                self._detector.check(buffered)
            self._request.start_response(*self._head, length=self.length)
            self._request.write(buffered)
            self.buffered.clear()
        await self._request.drain(limit_s=self._limits.write_s)


class EventStream:
    """A sink that forwards only complete events to the client. The first event commits the response."""

    __slots__ = (
        "_abort_detector", "_chunk_writer", "_early", "_head", "_last", "_limits", "_mark", "_on_start", "_ping_timer",
        "_request", "_splitter", "_summary", "started",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        status: int,
        head: bytes,
        limits: RelayLimits,
        abort_detector: AbortDetector,
        summary: StreamSummary | None,
        early: EarlyStream | None = None,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        self._request = request
        self._summary = summary
        self._early = early
        self._on_start = on_start
        self._head = status, head
        self._limits = limits
        self._abort_detector = abort_detector
        self._mark = abort_detector.event_mark
        self._splitter = EventSplitter()
        self.started = False
        self._last = b""  # the last events that were not written by the chunk writer
        self._chunk_writer: ChunkWriter | None = None
        self._ping_timer: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> bool:
        if data.endswith(EVENT_ENDS) and not self._splitter.tail:  # the usual case
            events = data
        else:
            try:
                events = self._splitter.feed(data)
            except EventTooLargeError as error:
                raise UpstreamError(str(error)) from error
            if not events:
                return True
        if events.rfind(self._mark) >= 0:
            self._abort_detector.check_events(events)
        if not self.started:
            self._start()
        writable = self._request.write(events)
        if self._summary is not None:
            self._summary.add(events)
        self._last = events
        return writable

    @property
    def final(self) -> bool:
        """Whether the final event of the stream was sent to the client."""
        return ends_stream(self._last)

    def chunk_writer(self) -> ChunkWriter | None:
        return None if self._splitter.tail else self._chunk_writer

    async def drain(self) -> None:
        self.stop_pings()
        await self._request.drain(limit_s=self._limits.write_s)
        self._schedule_ping()

    def end(self) -> None:
        """Sends the last event; called after the upstream body has ended without an error. Raises UpstreamError if that
        event is incomplete."""
        try:
            last = self._splitter.end()
        except UnfinishedEventError as error:
            raise UpstreamError(f"the replica's stream is cut: {error}") from error
        self._abort_detector.check_events(last)
        if not self.started:
            self._start()
        if last:
            if self._summary is not None:
                self._summary.add(last)
            self._request.write(last)

    def stop_pings(self) -> None:
        if self._ping_timer is not None:
            self._ping_timer.cancel()

    def _start(self) -> None:
        if self._early is not None:
            self._early.stop()
        if self._early is None or not self._early.started:
            self._request.start_response(*self._head, length=None)
        self.started = True
        if self._on_start is not None:
            self._on_start()
        write = self._request.write_chunk
        summary = self._summary
        if summary is not None and summary.exact and write is not None:
            write, summary = summary.counting(write), None
        self._chunk_writer = None if write is None else ChunkWriter(write, _EVENT_CHUNK_ENDS, self._mark, summary)
        self._schedule_ping()

    def _schedule_ping(self) -> None:
        self._request.idle = True
        self._ping_timer = asyncio.get_running_loop().call_later(self._limits.ping_s, self._ping)

    def _ping(self) -> None:
        """Sends a comment if the stream has paused. An event restarts no timer but only sets a flag, so a pause is
        noticed after one to two times `ping_s`."""
        if self._request.idle:
            try:
                self._request.write(PING)
            except DownstreamGoneError:
                return  # the next write raises this error in the request's task
        self._schedule_ping()
