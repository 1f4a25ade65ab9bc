"""The client side of both processes: aiohttp's low-level server on a bound socket, and answers its clients can read."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import HttpVersion11, web

from hpc_router.errors import BadRequestError, BodyTooLargeError, RequestTimeoutError
from hpc_router.relay.dialects import Fault, dialect_of

BACKLOG: Final = 4096
KEEP_ALIVE_S: Final = 75.0
"""How long a client may take to send a request's headers, after it has connected or had its last answer."""
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def listening(
    handler: Handler, sock: socket.socket, *, max_body: int, keep_alive_s: float = KEEP_ALIVE_S
) -> AsyncIterator[asyncio.Server]:
    """Serve until the end of the block, where connections are closed and handlers still running are cancelled.

    Closing the yielded server before that only stops new connections. Bodies above `max_body` bytes raise
    `web.HTTPRequestEntityTooLarge` where they are read.
    """
    loop = asyncio.get_running_loop()

    def make_request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=max_body)

    # A client that leaves cancels its handler, and with it the engine's work; aiohttp's own runners leave that off.
    server = web.Server(
        handler,
        request_factory=make_request,
        handler_cancellation=True,
        keepalive_timeout=keep_alive_s,
        access_log=None,
        logger=_logger(),
    )
    listener = await loop.create_server(server, sock=sock, backlog=BACKLOG)
    try:
        yield listener
    finally:
        listener.close()
        server.pre_shutdown()
        await server.shutdown(timeout=1.0)
        await listener.wait_closed()


async def read_body(request: web.BaseRequest, *, limit_s: float) -> bytes:
    """The whole body. Raises BadRequestError, BodyTooLargeError, or RequestTimeoutError after `limit_s` seconds."""
    encodings = request.headers.getall("content-encoding", ())
    if any(encoding.lower() != "identity" for encoding in encodings):
        raise BadRequestError("compressed request bodies are not taken")
    if request.headers.get("expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # what was sent is no part of the response
    try:
        if request.content.is_eof():  # it came with its headers, as most do
            return await request.read()
        async with asyncio.timeout(limit_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise BodyTooLargeError("the body is larger than router.max_body_mb admits") from error
    except web.RequestPayloadError as error:
        raise BadRequestError("the body cannot be read") from error
    except TimeoutError as error:
        raise RequestTimeoutError(f"the body did not arrive within {limit_s:g} s") from error


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


def json_response(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), status=status, content_type="application/json")


def error_response(
    status: int, *, kind: str, code: str, message: str, param: str | None = None, path: str = ""
) -> web.Response:
    """An error as the clients of the API at `path` read it; OpenAI's, where that says nothing."""
    body = dialect_of(path).body(Fault(status, kind, code, message, param))
    response = json_response(body, status=status)
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response
