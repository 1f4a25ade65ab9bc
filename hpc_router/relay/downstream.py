"""One response to one client, committed as late as possible.

Nothing is sent before the first body byte has come from upstream, and a non-streaming answer is held until it is
complete, so until then a failure can go elsewhere. Once committed, only whole events follow, and a failure ends the
stream with an error event (a stream) or with a broken connection (a long answer that was not held); never silently.
"""

import asyncio
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from hpc_router.errors import HpcRouterError, UpstreamError
from hpc_router.relay.sse import CONTENT_TYPE, EventSplitter, EventTooLargeError, error_event
from hpc_router.relay.upstream import UpstreamResponse


class DownstreamGoneError(HpcRouterError):
    """The client has closed its connection."""


class Downstream:
    """Writes to the client of `request`. `response` is what the handler returns in the end.

    A client that takes nothing for `write_s` seconds has gone as well: it holds a place on a replica.
    """

    def __init__(self, request: web.BaseRequest, *, hold_bytes: int, write_s: float) -> None:
        self._request = request
        self._hold_bytes = hold_bytes
        self._write_s = write_s
        self._streaming_events = False
        self.response: web.StreamResponse | None = None

    @property
    def committed(self) -> bool:
        return self.response is not None

    async def pass_on(self, upstream: UpstreamResponse, headers: CIMultiDict[str]) -> None:
        """The whole response. Raises what `UpstreamResponse.chunks` raises, and DownstreamGoneError."""
        if upstream.content_type == CONTENT_TYPE:
            await self._pass_events(upstream, headers)
        else:
            await self._pass_body(upstream, headers)

    async def break_off(self, error: dict[str, Any]) -> None:
        """End a committed response that cannot be completed."""
        assert self.response is not None
        if self._streaming_events:
            await self._write(error_event(error))
        elif self._request.transport is not None:
            self._request.transport.abort()

    async def _pass_events(self, upstream: UpstreamResponse, headers: CIMultiDict[str]) -> None:
        self._streaming_events = True
        splitter = EventSplitter()
        async for chunk in upstream.chunks():
            try:
                events = splitter.feed(chunk)
            except EventTooLargeError as error:
                raise UpstreamError(str(error)) from error
            if events:
                await self._commit(upstream.status, headers)
                await self._write(events)
        if splitter.tail:
            raise UpstreamError("the replica's stream ended inside an event")
        await self._commit(upstream.status, headers)

    async def _pass_body(self, upstream: UpstreamResponse, headers: CIMultiDict[str]) -> None:
        held = bytearray()
        async for chunk in upstream.chunks():
            if self.committed:
                await self._write(chunk)
                continue
            held += chunk
            if len(held) > self._hold_bytes:
                await self._commit(upstream.status, headers)
                await self._write(bytes(held))
        if not self.committed:
            self.response = web.Response(status=upstream.status, headers=headers, body=bytes(held))

    async def _commit(self, status: int, headers: CIMultiDict[str]) -> None:
        if self.response is None:
            self.response = web.StreamResponse(status=status, headers=headers)
            try:
                await self.response.prepare(self._request)
            except ConnectionError as error:
                raise DownstreamGoneError("the client has gone") from error

    async def _write(self, data: bytes) -> None:
        assert self.response is not None
        try:
            async with asyncio.timeout(self._write_s):
                await self.response.write(data)
        except ConnectionError as error:
            raise DownstreamGoneError("the client has gone") from error
        except TimeoutError as error:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise DownstreamGoneError("the client reads no more") from error
