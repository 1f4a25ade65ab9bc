"""The client side of a relay with a handler of the test's, and clients that send exactly the bytes they are given."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from hpc_router.errors import UpstreamError
from hpc_router.net import protocol
from hpc_router.relay.api_formats import api_format_of
from hpc_router.relay.downstream.interface import DownstreamGoneError, Handler, Request, Response
from hpc_router.relay.headers import NOT_DOWNSTREAM, crossing
from hpc_router.relay.response_relay import RelayLimits, ResponseRelay
from hpc_router.relay.upstream.interface import UpstreamTimeouts
from tests.relay.scripted import Answer as Script
from tests.relay.scripted import Scripted, scripted
from tests.support.relays import Listen, Relay
from tests.support.waiting import GUARD_S

PATIENT = UpstreamTimeouts(connect_s=GUARD_S, first_byte_s=GUARD_S, idle_s=GUARD_S)
MAX_BODY = 2**16
STUCK = 2**25
"""More bytes than the sockets' own buffers and ours can hold."""


class Client:
    """A connection, as a context that ends with its end."""

    def __init__(self, port: int, *, receives: int | None = None) -> None:
        self._port = port
        self._receives = receives  # bytes of the socket's buffer

    async def __aenter__(self) -> Self:
        sock = socket.socket()
        sock.setblocking(False)
        if self._receives is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receives)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        self.reader, self.writer = await asyncio.open_connection(sock=sock)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        """Leave with a reset."""
        connection: socket.socket = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def leave(self) -> None:
        self.writer.transport.abort()

    async def send(self, *pieces: bytes) -> None:
        """Each on its own, as far as the network lets us."""
        for piece in pieces:
            self.writer.write(piece)
            await asyncio.sleep(0)

    async def get(self, *fields: str, version: str = "1.1") -> None:
        await self.send("\r\n".join([f"GET / HTTP/{version}", "Host: x", *fields, "", ""]).encode())

    async def head(self) -> bytes:
        """Of an answer, in lower case."""
        async with asyncio.timeout(GUARD_S):
            return (await self.reader.readuntil(b"\r\n\r\n")).lower()

    async def status(self) -> int:
        return int((await self.head()).split(b" ", 2)[1])

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(GUARD_S):
            received = bytearray()
            while not received.endswith(end):
                piece = await self.reader.read(2**20)
                assert piece, f"the connection ended after {bytes(received[-200:])!r}"
                received += piece
            return bytes(received)

    async def rest(self) -> bytes:
        """All there is until the connection ends, in whichever way."""
        received = bytearray()
        with suppress(ConnectionError):
            async with asyncio.timeout(GUARD_S):
                while piece := await self.reader.read(2**20):
                    received += piece
        return bytes(received)


@asynccontextmanager
async def served(
    listen: Listen, handler: Handler, *, max_body: int = MAX_BODY, keep_alive_s: float = GUARD_S
) -> AsyncIterator[int]:
    """At the port that it yields."""
    sock = socket.create_server(("127.0.0.1", 0))
    async with listen(handler, sock, max_body=max_body, keep_alive_s=keep_alive_s):
        yield sock.getsockname()[1]


def sends(*pieces: bytes, length: int | None = None, head: bytes = b"") -> Handler:
    async def handler(request: Request) -> Response | None:
        request.start_response(200, head, length=length)
        for piece in pieces:
            if not request.write(piece):
                await request.drain()
        return None

    return handler


@dataclass
class Relayed:
    """What the router does, without the router. `ends`: how each request went; `begun`: how many came."""

    upstream: Scripted
    port: int
    begun: int = 0
    ends: list[str] = field(default_factory=list)


@asynccontextmanager
async def relayed(
    relay: Relay,
    *answers: Script,
    write_s: float = GUARD_S,
    ping_s: float = GUARD_S,
    buffer_bytes: int = 2**20,
    limits: UpstreamTimeouts = PATIENT,
    reads_bodies: bool = True,
    stream: bool = False,
    path: str = protocol.CHAT,
) -> AsyncIterator[Relayed]:
    async def handler(request: Request) -> Response | None:
        made.begun += 1
        answer = ResponseRelay(
            request, RelayLimits(buffer_bytes, write_s, ping_s), api_format_of(path).abort_detector, stream=stream
        )
        try:
            body = await request.read() if request.method == "POST" else None
            async with client.request(request.method, made.upstream.address, request.target, body=body) as upstream:
                await answer.relay(upstream, crossing(upstream.headers, drop=NOT_DOWNSTREAM))
            made.ends.append("complete")
        except DownstreamGoneError as error:
            made.ends.append(str(error))
        except UpstreamError as error:
            made.ends.append(type(error).__name__)
            if not answer.committed:
                return Response(502)
            await answer.end_with_error(b"event: error\n\n")
        except asyncio.CancelledError:
            made.ends.append("cancelled")
            raise
        return answer.response

    async with (
        scripted(*answers, reads_bodies=reads_bodies) as server,
        relay.make_client(limits) as client,
        served(relay.listen, handler, max_body=2**27) as port,
    ):
        made = Relayed(server, port)
        yield made
