"""The client side over aiohttp's low-level server: the reference that `server` is compared with by test.

aiohttp reads requests and makes heads and ends of answers. Between them its `write` costs a coroutine and several
calls per piece; pieces go into the transport past it, from where the upstream's bytes arrive.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import HttpVersion11, web

from hpc_router.errors import BadRequestError, BodyTooLargeError, RequestTimeoutError
from hpc_router.relay.downstream.cross_origin import OFF, CrossOrigin
from hpc_router.relay.downstream.interface import (
    KEEP_ALIVE_S,
    DownstreamGoneError,
    Handler,
    PendingResponse,
    Request,
    Response,
    check_encoding,
)
from hpc_router.relay.downstream.request_parser import single_slashes
from hpc_router.relay.downstream.server import BACKLOG, SHUTDOWN_S
from hpc_router.relay.headers import Headers, without_id
from tests.relay.reference.upstream import fields_of


class _Request(Request):
    def __init__(self, request: web.BaseRequest, cross_origin: CrossOrigin) -> None:
        self._request = request
        self._cross_origin = cross_origin
        self.method = request.method
        self.target = single_slashes(request.raw_path)
        self.path, self.query = single_slashes(request.path), request.rel_url.raw_query_string
        fields, self.request_id = without_id([(name.lower(), value) for name, value in request.raw_headers])
        self.headers = Headers(fields)
        self.keep_alive = request.keep_alive
        self._transport: asyncio.Transport | None = None
        self._chunked = self.idle = self.response_started = False
        self.sent: web.StreamResponse | None = None

    async def read(self, *, limit_s: float | None = None) -> bytes:
        check_encoding(self.headers)
        request = self._request
        if request.headers.get("expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # what was sent is no part of the answer
        try:
            async with asyncio.timeout(limit_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise BodyTooLargeError("the body is larger than router.max_body_mb") from error
        except web.RequestPayloadError as error:
            raise BadRequestError("the body cannot be read") from error
        except TimeoutError as error:
            raise RequestTimeoutError(f"the body did not arrive within {limit_s:g} s") from error

    def start_response(self, status: int, head: bytes, *, length: int | None) -> None:
        self.sent = answer = web.StreamResponse(status=status, headers=self._fields(head))
        answer.content_length = length
        if not self.keep_alive or (self._request.version < HttpVersion11 and length is None):
            answer.force_close()  # its end is the connection's, even for a client that asks to keep it
        try:
            answer.prepare(self._request).send(None)
        except StopIteration:
            pass  # it has nothing to wait for
        except ConnectionError as error:
            raise DownstreamGoneError("the client has gone") from error
        else:
            raise AssertionError("aiohttp waits before it sends a head")
        if self._request.transport is None:
            raise DownstreamGoneError("the client has gone")
        self._transport = self._request.transport
        self.response_started = True
        self._chunked = answer.headers.get("transfer-encoding") == "chunked"

    def write(self, data: bytes) -> bool:
        assert self._transport is not None
        if self._transport.is_closing():
            raise DownstreamGoneError("the client has gone")
        self.idle = False
        if self.method != "HEAD":
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return not self._request.protocol.writing_paused

    async def drain(self, *, limit_s: float | None = None) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._request.writer.drain()
        except ConnectionError as error:
            raise DownstreamGoneError("the client has gone") from error
        except TimeoutError as error:
            self.abort()
            raise DownstreamGoneError("the client does not read") from error

    def abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    def _fields(self, head: bytes) -> Any:
        return fields_of(head + self._cross_origin.lines(self.headers) if self._cross_origin.origins else head)

    def finish(self, response: Response | None) -> web.StreamResponse:
        """What aiohttp wants from its handler."""
        if response is None:
            assert self.sent is not None, "the handler has neither answered nor returned an answer"
            return self.sent
        answer = web.Response(status=response.status, headers=self._fields(response.head), body=response.body)
        if not self.keep_alive:
            answer.force_close()
        return answer


@asynccontextmanager
async def listening(
    handler: Handler,
    sock: socket.socket,
    *,
    max_body: int,
    keep_alive_s: float = KEEP_ALIVE_S,
    cross_origin: CrossOrigin = OFF,
    tls: ssl.SSLContext | None = None,
    streams_body: object = None,
) -> AsyncIterator[asyncio.Server]:
    """See `server.listening`. Every request is the handler's from the beginning."""
    loop = asyncio.get_running_loop()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        wrapped = _Request(request, cross_origin)
        try:
            outcome = handler(wrapped)
            assert not isinstance(outcome, PendingResponse)  # the body is not known in advance here
            return wrapped.finish(await outcome)
        except DownstreamGoneError:
            assert wrapped.sent is not None
            return wrapped.sent

    def make_request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=max_body)

    # A client that leaves cancels its handler, and with it the engine's work; aiohttp's own runners leave that off.
    server = web.Server(
        handle,
        request_factory=make_request,
        handler_cancellation=True,
        keepalive_timeout=keep_alive_s,
        access_log=None,
        logger=_logger(),
    )
    listener = await loop.create_server(server, sock=sock, backlog=BACKLOG, ssl=tls)
    try:
        yield listener
    finally:
        listener.close()
        server.pre_shutdown()
        await server.shutdown(timeout=SHUTDOWN_S)
        await listener.wait_closed()


class _WithoutContent(logging.Filter):
    """aiohttp logs what it could not parse: headers and bodies, tokens among them. The kind of error has to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        record.msg, record.args = f"{str(record.msg).split(':', 1)[0].replace('%s', '?')} {kind}", ()
        record.exc_info = record.exc_text = None
        return True


def _logger() -> logging.Logger:
    logger = logging.getLogger("hpc_router.http")
    if not logger.filters:
        logger.addFilter(_WithoutContent())
    return logger
