"""The client side of both processes: connections of clients on a bound socket.

It exists because aiohttp's request handler costs more than all the rest of a relayed request: three tasks woken, a
request, a writer and a response made for each.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from hpc_router.relay.downstream.connection import ClientConnection
from hpc_router.relay.downstream.interface import KEEP_ALIVE_S, Express, Handler

BACKLOG: Final = 4096
SHUTDOWN_S: Final = 1.0


class Server:
    """What all connections of clients to one handler share."""

    def __init__(self, handler: Handler, *, max_body: int, keep_alive_s: float, express: Express | None = None) -> None:
        self.handler = handler
        self.express = express
        self.max_body = max_body
        self.keep_alive_s = keep_alive_s
        self.loop = asyncio.get_running_loop()
        self.connections: set[ClientConnection] = set()
        self.stopping = False
        self._all_left: asyncio.Future[None] | None = None

    def connection(self) -> ClientConnection:
        return ClientConnection(self)

    def left(self, connection: ClientConnection) -> None:
        self.connections.discard(connection)
        if self._all_left is not None and not self.connections and not self._all_left.done():
            self._all_left.set_result(None)

    async def shut_down(self) -> None:
        self.stopping = True
        for connection in tuple(self.connections):
            connection.stop()
        tasks = [task for connection in tuple(self.connections) if (task := connection.task) is not None]
        if tasks:
            _, running = await asyncio.wait(tasks, timeout=SHUTDOWN_S)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if self.connections:  # some clients have not taken all of their answers yet
            self._all_left = self.loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(SHUTDOWN_S):
                    await self._all_left
        for connection in tuple(self.connections):
            connection.abort()


@asynccontextmanager
async def listening(
    handler: Handler,
    sock: socket.socket,
    *,
    max_body: int,
    keep_alive_s: float = KEEP_ALIVE_S,
    express: Express | None = None,
) -> AsyncIterator[asyncio.Server]:
    """Serve until the end of the block, where connections are closed and handlers still running are cancelled.

    Closing the yielded server before that only stops new connections. Bodies above `max_body` bytes are refused.
    """
    server = Server(handler, max_body=max_body, keep_alive_s=keep_alive_s, express=express)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # its connections have it as well
    listener = await server.loop.create_server(server.connection, sock=sock, backlog=BACKLOG)
    try:
        yield listener
    finally:
        listener.close()
        await server.shut_down()
        await listener.wait_closed()
