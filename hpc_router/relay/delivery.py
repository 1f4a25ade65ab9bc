"""The body of one response, straight into the client's transport.

aiohttp makes and sends the head and the end of a response. Between them its `write` costs a coroutine and several
calls per event; this is a plain method that may be called where the upstream's bytes arrive. Its caller must stop when
it says so, or the transport's buffer grows without bound.
"""

import asyncio

from aiohttp import HttpVersion11, web

from hpc_router.errors import HpcRouterError


class DownstreamGoneError(HpcRouterError):
    """The client has closed its connection, or reads no more."""


class Delivery:
    """`begin`, then `write`, with a `drain` after each one that returned False. aiohttp ends what the handler returns.

    A client that takes nothing for `write_s` seconds has gone as well: it holds a place on a replica.
    """

    def __init__(self, request: web.BaseRequest, *, write_s: float | None = None) -> None:
        self._request = request
        self._write_s = write_s
        self._protocol = request.protocol
        self._transport: asyncio.Transport | None = None
        self._chunked = False

    @property
    def begun(self) -> bool:
        return self._transport is not None

    async def begin(self, response: web.StreamResponse) -> None:
        """Send the head."""
        if self._request.version < HttpVersion11 and response.content_length is None:
            response.force_close()  # its end is the connection's, even for a client that asks to keep it
        try:
            await response.prepare(self._request)
        except ConnectionError as error:
            raise DownstreamGoneError("the client has gone") from error
        if self._request.transport is None:
            raise DownstreamGoneError("the client has gone")
        self._transport = self._request.transport
        self._chunked = response.headers.get("transfer-encoding") == "chunked"

    def write(self, data: bytes) -> bool:
        """False: `drain` before the next one."""
        assert self._transport is not None
        if self._transport.is_closing():
            raise DownstreamGoneError("the client has gone")
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return not self._protocol.writing_paused

    async def drain(self) -> None:
        """Until the client has taken most of what was written."""
        try:
            async with asyncio.timeout(self._write_s):
                await self._request.writer.drain()
        except ConnectionError as error:
            raise DownstreamGoneError("the client has gone") from error
        except TimeoutError as error:
            self.abort()
            raise DownstreamGoneError("the client reads no more") from error

    def abort(self) -> None:
        """Break the connection: the only way to say that a body without events is incomplete."""
        if self._request.transport is not None:
            self._request.transport.abort()
