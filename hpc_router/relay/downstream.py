"""One response to one client, committed as late as possible.

Nothing is sent before the first body byte has come from upstream, and a non-streaming answer is held until it is
complete, so until then a failure can go elsewhere. Once committed, only whole events follow, and a failure ends the
stream with an error event (a stream) or with a broken connection (a long answer that was not held); never silently.
"""

from typing import Final

from aiohttp import web
from multidict import CIMultiDict

from hpc_router.errors import UpstreamError
from hpc_router.relay.delivery import Delivery
from hpc_router.relay.exchange import UpstreamResponse
from hpc_router.relay.sse import CONTENT_TYPE, EventSplitter, EventTooLargeError

_SHORT_BYTES: Final = 2**16
"""What aiohttp may be left to send at its leisure."""


class Downstream:
    """Writes to the client of `request`. `response` is what the handler returns in the end."""

    def __init__(self, request: web.BaseRequest, *, hold_bytes: int, write_s: float) -> None:
        self._hold_bytes = hold_bytes
        self._delivery = Delivery(request, write_s=write_s)
        self._streaming_events = False
        self.response: web.StreamResponse | None = None

    @property
    def committed(self) -> bool:
        return self.response is not None

    async def pass_on(self, upstream: UpstreamResponse, headers: CIMultiDict[str]) -> None:
        """The whole response. Raises what `UpstreamResponse.flow` raises, and DownstreamGoneError."""
        if upstream.content_type == CONTENT_TYPE:
            self._streaming_events = True
            events = _Events(self, upstream.status, headers, hold_bytes=0)
            await upstream.flow(events)
            events.check_end()
            if not self.committed:
                await self.commit(upstream.status, headers)
            return
        body = _Body(self, upstream.status, headers, hold_bytes=self._hold_bytes)
        await upstream.flow(body)
        if self.committed:
            return
        if len(body.held) <= _SHORT_BYTES:
            self.response = web.Response(status=upstream.status, headers=headers, body=bytes(body.held))
        else:  # the client's place is held until it has taken most of it
            body.length = len(body.held)
            await body.make_room()

    async def break_off(self, event: bytes) -> None:
        """End a committed response that cannot be completed; `event` tells a stream's client."""
        assert self.response is not None
        if not self._streaming_events:
            self._delivery.abort()
        elif not self._delivery.write(event):
            await self._delivery.drain()

    async def commit(self, status: int, headers: CIMultiDict[str], *, length: int | None = None) -> Delivery:
        """From here on there is no other replica to go to."""
        self.response = web.StreamResponse(status=status, headers=headers)
        self.response.content_length = length
        await self._delivery.begin(self.response)
        return self._delivery


class _Body:
    """A sink that holds up to `hold_bytes` bytes; more than that commits the response."""

    def __init__(self, downstream: Downstream, status: int, headers: CIMultiDict[str], *, hold_bytes: int) -> None:
        self._downstream = downstream
        self._head = status, headers
        self._hold_bytes = hold_bytes
        self._delivery: Delivery | None = None
        self.held = bytearray()
        self.length: int | None = None  # once all of it is held

    def take(self, data: bytes) -> bool:
        if self._delivery is not None:
            return self._delivery.write(data)
        self.held += data
        return len(self.held) <= self._hold_bytes

    async def make_room(self) -> None:
        if self._delivery is None:
            self._delivery = await self._downstream.commit(*self._head, length=self.length)
            self._delivery.write(bytes(self.held))
            self.held.clear()
        await self._delivery.drain()


class _Events(_Body):
    """Lets whole events through only."""

    def __init__(self, downstream: Downstream, status: int, headers: CIMultiDict[str], *, hold_bytes: int) -> None:
        super().__init__(downstream, status, headers, hold_bytes=hold_bytes)
        self._splitter = EventSplitter()

    def take(self, data: bytes) -> bool:
        try:
            events = self._splitter.feed(data)
        except EventTooLargeError as error:
            raise UpstreamError(str(error)) from error
        if not events:
            return True
        return self._delivery.write(events) if self._delivery is not None else super().take(events)

    def check_end(self) -> None:
        if self._splitter.tail:
            raise UpstreamError("the replica's stream ended inside an event")
