"""HTTP server of the router and of the agent, on a bound socket.

aiohttp's server is not used because it costs more CPU than all other work of a relayed request: for each request it
wakes three tasks and creates a request, a writer and a response object.
"""

import asyncio
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from hpc_router.relay.downstream.connection import ClientConnection
from hpc_router.relay.downstream.cross_origin import OFF, CrossOrigin
from hpc_router.relay.downstream.interface import KEEP_ALIVE_S, Handler
from hpc_router.relay.downstream.request_parser import RequestHead

BACKLOG: Final = 4096
"""Maximum number of connections that wait in the kernel to be accepted."""
SHUTDOWN_S: Final = 1.0
"""Maximum time in seconds for the connections to end before their handlers are cancelled."""


class Server:
    """The state that all client connections of one server share."""

    def __init__(
        self,
        handler: Handler,
        *,
        max_body: int,
        keep_alive_s: float,
        cross_origin: CrossOrigin,
        streams_body: Callable[[RequestHead], bool] | None = None,
    ) -> None:
        self.handler = handler
        self.streams_body = streams_body
        self.cross_origin = cross_origin
        self.max_body = max_body
        self.keep_alive_s = keep_alive_s
        self.loop = asyncio.get_running_loop()
        self.connections: set[ClientConnection] = set()
        self.stopping = False
        self._all_left: asyncio.Future[None] | None = None

    def connection(self) -> ClientConnection:
        return ClientConnection(self)

    def left(self, connection: ClientConnection) -> None:
        """Removes a connection that has ended."""
        self.connections.discard(connection)
        if self._all_left is not None and not self.connections and not self._all_left.done():
            self._all_left.set_result(None)

    async def shut_down(self) -> None:
        """Ends all connections; cancels the handlers that still run after `SHUTDOWN_S`."""
        self.stopping = True
        for connection in tuple(self.connections):
            connection.stop()
        await self._wait_until_all_left()
        tasks = [task for connection in tuple(self.connections) if (task := connection.task) is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in tuple(self.connections):
            connection.abort()

    async def _wait_until_all_left(self) -> None:
        if self.connections:
            self._all_left = self.loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(SHUTDOWN_S):
                    await self._all_left


@asynccontextmanager
async def listening(
    handler: Handler,
    sock: socket.socket,
    *,
    max_body: int,
    keep_alive_s: float = KEEP_ALIVE_S,
    cross_origin: CrossOrigin = OFF,
    tls: ssl.SSLContext | None = None,
    streams_body: Callable[[RequestHead], bool] | None = None,
) -> AsyncIterator[asyncio.Server]:
    """Serves on `sock` until the end of the block, which closes all connections and cancels running handlers. If the
    caller closes the yielded server earlier, existing connections stay open and no new ones are accepted. Request
    bodies above `max_body` bytes are rejected. `cross_origin` adds its header lines to every response. `tls`: the
    context to serve HTTPS with; None: plain HTTP. `streams_body`: returns whether the handler reads the body of a
    request with this head through `Request.body_chunks`; such a body may have any length."""
    server = Server(
        handler, max_body=max_body, keep_alive_s=keep_alive_s, cross_origin=cross_origin, streams_body=streams_body
    )
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # inherited by its connections
    listener = await server.loop.create_server(server.connection, sock=sock, backlog=BACKLOG, ssl=tls)
    try:
        yield listener
    finally:
        listener.close()
        await server.shut_down()
        await listener.wait_closed()


def raise_file_limit() -> None:
    """Raises the soft limit of open files to the hard limit. A common soft limit is 1,024, and each stream has two
    sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
