"""Requests that are served without a task: order of responses, continuing in a task, and disconnects."""

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from hpc_router.relay.downstream.interface import PendingResponse, Request, Response
from hpc_router.relay.downstream.server import listening
from tests.support.waiting import eventually

GET = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Pending(PendingResponse):
    """A response that the test completes."""

    request: Request
    served: "Served"
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    async def run(self) -> Response | None:
        return await self.served.respond(self.request)

    def answer(self) -> None:
        self.request.respond(200, b"", f"<fast {self.request.path}>".encode())


@dataclass
class Served:
    """Serves a request without a task if its path is in `fast`."""

    fast: set[str]
    works: list[Pending] = field(default_factory=list)
    handled: list[str] = field(default_factory=list)

    def handle(self, request: Request) -> Pending | Coroutine[Any, Any, Response | None]:
        if request.path not in self.fast:
            return self.respond(request)
        self.works.append(Pending(request, self))
        return self.works[-1]

    async def respond(self, request: Request) -> Response | None:
        self.handled.append(request.path)
        return Response(200, body=f"<task {request.path}>".encode())


@asynccontextmanager
async def serving(*fast: str) -> AsyncIterator[tuple[Served, asyncio.StreamReader, asyncio.StreamWriter]]:
    sock = socket.create_server(("127.0.0.1", 0))
    served = Served(set(fast))
    async with listening(served.handle, sock, max_body=2**16):
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        yield served, reader, writer
        writer.transport.abort()


async def bodies(reader: asyncio.StreamReader, count: int) -> list[bytes]:
    return [(await reader.readuntil(b">")).rpartition(b"<")[2].rstrip(b">") for _ in range(count)]


async def test_one_after_the_other_over_one_connection() -> None:
    async with serving("/1", "/3") as (served, reader, writer):
        for number in (1, 2, 3):
            writer.write(GET % number)
            if number == 2:
                assert await bodies(reader, 1) == [b"task /2"]
            else:
                await eventually(lambda: bool(served.works))
                served.works.pop().answer()
                assert await bodies(reader, 1) == [b"fast /%d" % number]


async def test_what_follows_waits_for_its_turn() -> None:
    """Whatever wakes the connection's task meanwhile."""
    async with serving("/1") as (served, reader, writer):
        writer.write(GET % 1)
        await eventually(lambda: bool(served.works))
        writer.write(GET % 2 + GET % 3)
        connection: asyncio.Protocol = served.works[0].request.connection  # type: ignore[attr-defined]
        await eventually(lambda: len(connection._parser.waiting) == 2)  # type: ignore[attr-defined]
        connection.pause_writing()
        connection.resume_writing()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not served.handled
        served.works[0].answer()
        assert await bodies(reader, 3) == [b"fast /1", b"task /2", b"task /3"]


async def test_all_that_comes_at_once_is_answered_in_order() -> None:
    async with serving("/1") as (served, reader, writer):
        writer.write(GET % 1 + GET % 2)
        await eventually(lambda: bool(served.works))
        served.works[0].answer()
        assert await bodies(reader, 2) == [b"fast /1", b"task /2"]


async def test_the_handler_takes_over() -> None:
    async with serving("/1") as (served, reader, writer):
        writer.write(GET % 1)
        await eventually(lambda: bool(served.works))
        served.works[0].request.resume()
        assert await bodies(reader, 1) == [b"task /1"]
        assert not served.works[0].cancelled


async def test_a_client_that_leaves_cancels_it_once() -> None:
    async with serving("/1") as (served, _, writer):
        writer.write(GET % 1)
        await eventually(lambda: bool(served.works))
        writer.close()
        await eventually(lambda: served.works[0].cancelled)
        assert not served.handled


async def test_one_who_leaves_while_it_is_being_handed_over() -> None:
    async with serving("/1") as (served, _, writer):
        writer.write(GET % 1)
        await eventually(lambda: bool(served.works))
        served.works[0].request.abort()
        served.works[0].request.resume()
        await eventually(lambda: served.works[0].cancelled)
        assert not served.handled
        writer.close()


async def test_a_response_to_a_client_that_has_left_is_not_cancelled_as_well() -> None:
    async with serving("/1") as (served, reader, writer):
        writer.write(GET % 1)
        await eventually(lambda: bool(served.works))
        served.works[0].request.abort()
        served.works[0].answer()
        assert not await reader.read()
        assert not served.works[0].cancelled
        writer.close()


async def test_the_last_answer_of_a_connection_closes_it() -> None:
    async with serving("/1") as (served, reader, writer):
        writer.write(b"GET /1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await eventually(lambda: bool(served.works))
        served.works[0].answer()
        assert (await reader.read()).endswith(b"<fast /1>")


async def test_a_streamed_response_may_end_without_a_task() -> None:
    async with serving("/1") as (served, reader, writer):
        for _ in range(2):
            writer.write(GET % 1)
            await eventually(lambda: bool(served.works))
            request = served.works.pop().request
            request.start_response(200, b"", length=None)
            request.write(b"abc")
            request.end()
            assert (await reader.readuntil(b"\r\n0\r\n\r\n")).endswith(b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        assert not served.handled


async def test_a_streamed_response_that_ends_while_the_server_stops_is_the_connection_s_last() -> None:
    async with asyncio.TaskGroup() as tasks, serving("/1") as (served, reader, writer):
        writer.write(GET % 1)
        await eventually(lambda: bool(served.works))
        request = served.works.pop().request
        request.start_response(200, b"", length=None)
        connection = request.connection  # type: ignore[attr-defined]
        tasks.create_task(connection.server.shut_down())
        await eventually(lambda: connection.server.stopping)
        request.end()
        assert not request.keep_alive
        assert (await reader.read()).endswith(b"\r\n\r\n0\r\n\r\n")
        writer.close()


async def test_the_end_of_serving_waits_for_an_answer_to_be_taken() -> None:
    """By a client that reads slowly: the last of it is in the transport's buffer, and nobody is being served."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = b"x" * 60_000

    async def handle(request: Request) -> Response:
        return Response(200, body=body)

    async with listening(handle, sock, max_body=2**16):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, sock.getsockname())
        await loop.sock_sendall(client, GET % 1)
        received = await loop.sock_recv(client, 1024)
        reading = asyncio.create_task(rest(client))
    assert (received + await reading).endswith(body)
    client.close()


async def rest(client: socket.socket) -> bytes:
    received = b""
    while data := await asyncio.get_running_loop().sock_recv(client, 4096):
        received += data
    return received
