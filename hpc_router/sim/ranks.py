"""The simulated engine on several nodes: ranks connect to the master's port, and end when they lose each other.

Rank 0 listens at that port, waits for all other ranks, and then serves. The others only keep their connection open. A
port that is in use, a missing rank and a lost rank therefore look the same as with a real engine.
"""

import asyncio
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from hpc_router.errors import LaunchError

RETRY_S: Final = 0.05
PEER_LOST: Final = "RuntimeError: simulated: connection closed by peer"
"""The last log line of a rank that has lost another rank."""


@dataclass
class Rendezvous:
    """Rank 0's listener for the other ranks. `complete`: set when all of them are connected. `lost`: set when one of
    them has disconnected."""

    others: int
    address: str
    port: int
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_server(self._joined, self.address, self.port)
        except OSError as error:
            raise LaunchError(f"ranks cannot meet at {self.address} port {self.port}: {error.strerror}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        if len(self._writers) == self.others:
            self.complete.set()
        try:
            await reader.read()
        except ConnectionError:
            pass
        finally:
            self.lost.set()


async def follow_master(address: str, port: int, stop: asyncio.Event) -> bool:
    """Runs a rank other than 0. Returns True once `stop` is set; False if the master disconnects before that."""
    stopped = asyncio.create_task(stop.wait())
    connection = asyncio.create_task(_stay_connected(address, port))
    try:
        await asyncio.wait({stopped, connection}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        connection.cancel()
        await asyncio.gather(stopped, connection, return_exceptions=True)
    return stop.is_set()


async def _stay_connected(address: str, port: int) -> None:
    """Connects to the master, with retries until it listens, and returns when the master has disconnected."""
    while True:
        try:
            reader, writer = await asyncio.open_connection(address, port)
        except OSError:
            await asyncio.sleep(RETRY_S)
            continue
        try:
            await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()
        return
