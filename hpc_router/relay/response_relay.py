"""One upstream response to one client, committed as late as possible.

Nothing is sent before the first body byte has come from upstream, and a non-streaming answer is held until it is
complete, so until then a failure can go elsewhere. Once committed, only whole events follow, with a comment between
them where the stream pauses, and a failure ends the stream with an error event (a stream) or with a broken connection
(a long answer that was not held, or a stream without events); never silently.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

from hpc_router.errors import UpstreamError
from hpc_router.relay.aborted_responses import Ending, Unheld
from hpc_router.relay.downstream.interface import SHORT_BYTES, DownstreamGoneError, Request, Response
from hpc_router.relay.sse import (
    CONTENT_TYPE,
    EVENT_ENDS,
    PING,
    EventSplitter,
    EventTooLargeError,
    UnfinishedEventError,
)
from hpc_router.relay.upstream.interface import CHUNK_END, ChunkWriter, UpstreamResponse

_EVENT_CHUNK_ENDS: Final = tuple(end + CHUNK_END for end in EVENT_ENDS)


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """How much of an answer may be held, how long a client may take nothing, and how long a stream may pause before a
    comment is sent."""

    hold_bytes: int
    write_s: float
    ping_s: float


class ResponseRelay:
    """The answer to `request`. `response` is what its handler returns in the end.

    `ending`: of the API that it belongs to. `stream`: the request asks for one, so a body without a length is passed on
    as it comes, whatever its content type.
    """

    __slots__ = ("_ending", "_limits", "_request", "_stream", "_streaming_events", "response", "status")

    def __init__(self, request: Request, limits: RelayLimits, ending: type[Ending], *, stream: bool) -> None:
        self._request = request
        self._limits = limits
        self._ending = ending
        self._stream = stream
        self._streaming_events = False
        self.status = 0
        self.response: Response | None = None

    @property
    def committed(self) -> bool:
        return self.response is not None or self._request.begun

    async def pass_on(self, upstream: UpstreamResponse, head: bytes) -> None:
        """The whole of it. Raises what `UpstreamResponse.flow` raises, UpstreamAbortedError and DownstreamGoneError."""
        self.status = upstream.status
        if upstream.content_type == CONTENT_TYPE:
            self._streaming_events = True
            events = _EventStream(self._request, self.status, head, self._limits, self._ending())
            try:
                await upstream.flow(events)
                await events.end()
            finally:
                events.stop_pings()
            return
        whole = upstream.whole
        if whole is not None and len(whole) <= SHORT_BYTES:
            self._ending().check_whole(whole)
            self.response = Response(self.status, head, whole)
            return
        passes = self._stream and upstream.length is None and 200 <= self.status < 300
        body = _BufferedBody(
            self._request, self.status, head, self._limits, hold_bytes=0 if passes else self._limits.hold_bytes
        )
        await upstream.flow(body)
        if self._request.begun:
            return
        self._ending().check_whole(body.held)
        if len(body.held) <= SHORT_BYTES:
            self.response = Response(self.status, head, bytes(body.held))
        else:  # the client's place is held until it has taken most of it
            body.length = len(body.held)
            await body.make_room()

    async def break_off(self, event: bytes) -> None:
        """End a committed answer that cannot be completed; `event` tells why."""
        if not self._streaming_events:
            self._request.abort()
        elif not self._request.write(event):
            await self._request.drain(limit_s=self._limits.write_s)


class _BufferedBody:
    """A sink that holds up to `hold_bytes` bytes; more than that commits the answer."""

    def __init__(self, request: Request, status: int, head: bytes, limits: RelayLimits, *, hold_bytes: int) -> None:
        self._request = request
        self._head = status, head
        self._limits = limits
        self._hold_bytes = hold_bytes
        self._unheld = Unheld()
        self.held = bytearray()
        self.length: int | None = None  # once all of it is held

    def take(self, data: bytes) -> bool:
        if self._request.begun:
            self._unheld.check(data)
            return self._request.write(data)
        self.held += data
        return len(self.held) <= self._hold_bytes

    def passage(self) -> None:
        """None: what is passed on unheld is looked at, without the framing of chunks in between."""

    async def make_room(self) -> None:
        if not self._request.begun:
            held = bytes(self.held)
            if self.length is None:
                self._unheld.check(held)
            await self._request.begin(*self._head, length=self.length)
            self._request.write(held)
            self.held.clear()
        await self._request.drain(limit_s=self._limits.write_s)


class _EventStream:
    """A sink that lets whole events through only. The first of them commits the answer."""

    def __init__(self, request: Request, status: int, head: bytes, limits: RelayLimits, ending: Ending) -> None:
        self._request = request
        self._head = status, head
        self._limits = limits
        self._ending = ending
        self._mark = ending.event_mark
        self._splitter = EventSplitter()
        self._first = b""  # what has come before the answer is begun
        self._begun = False
        self._passage: ChunkWriter | None = None
        self._alarm: asyncio.TimerHandle | None = None

    def take(self, data: bytes) -> bool:
        try:
            events = self._splitter.feed(data)
        except EventTooLargeError as error:
            raise UpstreamError(str(error)) from error
        if not events:
            return True
        if events.rfind(self._mark) >= 0:
            self._ending.check_events(events)
        if self._begun:
            return self._request.write(events)
        self._first += events
        return False

    def passage(self) -> ChunkWriter | None:
        return None if self._splitter.tail else self._passage

    async def make_room(self) -> None:
        if not self._begun:
            await self._begin()
        self.stop_pings()
        await self._request.drain(limit_s=self._limits.write_s)
        self._set_alarm()

    async def end(self) -> None:
        """The upstream's body has ended as it should."""
        try:
            last = self._splitter.end()
        except UnfinishedEventError as error:
            raise UpstreamError(f"the replica's stream is cut: {error}") from error
        self._ending.check_events(last)
        if not self._begun:
            self._first += last
            await self._begin()
        elif last:
            self._request.write(last)

    def stop_pings(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()

    async def _begin(self) -> None:
        await self._request.begin(*self._head, length=None)
        self._begun = True
        write = self._request.write_chunk
        self._passage = None if write is None else ChunkWriter(write, _EVENT_CHUNK_ENDS, self._mark)
        if self._first:
            self._request.write(self._first)

    def _set_alarm(self) -> None:
        self._request.quiet = True
        self._alarm = asyncio.get_running_loop().call_later(self._limits.ping_s, self._ring)

    def _ring(self) -> None:
        """The clock of an event is not looked at: a pause is noticed after one to two times `ping_s`."""
        if self._request.quiet:
            try:
                self._request.write(PING)
            except DownstreamGoneError:
                return  # the next event, or the end, meets it as well
        self._set_alarm()
