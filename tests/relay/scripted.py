"""An upstream that sends exactly the bytes of its script: a real server on port 0."""

import asyncio
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from hpc_router.relay.upstream.interface import Address, address_of


class End(Enum):
    CLOSE = "in good order"
    RESET = "with a reset"
    HANG = "until the client leaves"
    READ = "once all that it sends has been read"
    PAUSE = "not yet: until it is told to go on"


Answer = Sequence[bytes | End]


@dataclass
class Scripted:
    """Plays its answers one per request, the last one for ever; without an end the connection is kept."""

    answers: deque[Answer]
    address: Address
    reads_bodies: bool = True
    connections: int = 0
    left: int = 0  # connections that the client closed
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    written: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    go_on: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left += 1
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        at = head.lower().find(b"content-length:")
        if at >= 0 and self.reads_bodies:
            self.bodies.append(await reader.readexactly(int(head[at + 15 :].split(b"\r\n", 1)[0])))
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.popleft()
        for step in answer:
            match step:
                case bytes():
                    writer.write(step)
                    await writer.drain()
                    self.written += len(step)
                    await asyncio.sleep(0)
                case End.CLOSE:
                    return False
                case End.RESET:
                    connection: socket.socket = writer.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return False
                case End.READ:
                    await reader.read()
                    raise ConnectionError
                case End.PAUSE:
                    await self.go_on.acquire()
                case End.HANG:
                    await reader.readexactly(1)
        return True


@asynccontextmanager
async def scripted(
    *answers: Answer,
    reads_bodies: bool = True,
    host: str = "127.0.0.1",
    path: Path | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Scripted]:
    made = Scripted(deque(answers), address_of("http://engine"), reads_bodies)
    if path is not None:
        server = await asyncio.start_unix_server(made.serve, path)
    else:
        server = await asyncio.start_server(made.serve, host, 0, ssl=tls)
        name = f"[{host}]" if ":" in host else host
        made.address = address_of(f"http://{name}:{server.sockets[0].getsockname()[1]}")
    try:
        yield made
    finally:
        server.close()
        for writer in made.writers:
            writer.transport.abort()
        await server.wait_closed()
        await asyncio.sleep(0)  # their handlers end


def chunked(*pieces: bytes, trailers: bytes = b"", extension: bytes = b"") -> bytes:
    return b"".join(b"%x%b\r\n%b\r\n" % (len(p), extension, p) for p in pieces) + b"0\r\n" + trailers + b"\r\n"


def head(*fields: bytes, status: bytes = b"200 OK", version: bytes = b"1.1") -> bytes:
    return b"HTTP/%b %b\r\n" % (version, status) + b"".join(f + b"\r\n" for f in fields) + b"\r\n"


CHUNKED = b"transfer-encoding: chunked"


def sized(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    return head(b"content-length: %d" % len(body), *fields, status=status) + body
