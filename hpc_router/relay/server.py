"""The client side of both processes: aiohttp's low-level server on a bound socket, and answers in OpenAI's shape."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import web

BACKLOG: Final = 4096
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def listening(handler: Handler, sock: socket.socket, *, max_body: int) -> AsyncIterator[asyncio.Server]:
    """Serve until the end of the block, where connections are closed and handlers still running are cancelled.

    Closing the yielded server before that only stops new connections. Bodies above `max_body` bytes raise
    `web.HTTPRequestEntityTooLarge` where they are read.
    """
    loop = asyncio.get_running_loop()

    def make_request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=max_body)

    # A client that leaves cancels its handler, and with it the engine's work; aiohttp's own runners leave that off.
    server = web.Server(handler, request_factory=make_request, handler_cancellation=True, access_log=None)
    listener = await loop.create_server(server, sock=sock, backlog=BACKLOG)
    try:
        yield listener
    finally:
        listener.close()
        server.pre_shutdown()
        await server.shutdown(timeout=1.0)
        await listener.wait_closed()


def json_response(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), status=status, content_type="application/json")


def error_response(status: int, *, kind: str, code: str, message: str, param: str | None = None) -> web.Response:
    """An error as OpenAI's clients read it."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    response = json_response({"error": error}, status=status)
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response
