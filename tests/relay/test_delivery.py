"""A response's body straight into the client's transport, seen from the client's side of the socket."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from hpc_router.relay.delivery import Delivery, DownstreamGoneError
from hpc_router.relay.downstream import Downstream
from hpc_router.relay.exchange import Limits
from hpc_router.relay.server import Handler, listening
from hpc_router.relay.sse import CONTENT_TYPE
from hpc_router.relay.upstream import UpstreamClient
from tests.relay.scripted import CHUNKED, Answer, End, MakeClient, Scripted, head, scripted, sized
from tests.waiting import GUARD_S, eventually

LIMITS = Limits(connect_s=GUARD_S, first_byte_s=GUARD_S, idle_s=GUARD_S)
PIECE = b"x" * 2**16
STUCK = 2**25
"""More than the sockets' own buffers and ours can hold."""


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[int]:
    sock = socket.create_server(("127.0.0.1", 0))
    async with listening(handler, sock, max_body=2**20):
        yield sock.getsockname()[1]


async def ask(port: int, version: str = "1.1", *fields: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join([f"GET / HTTP/{version}", "Host: x", *fields, "", ""]).encode())
    return reader, writer


def sends(*pieces: bytes, length: int | None = None) -> Handler:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response, delivery = web.StreamResponse(), Delivery(request)
        response.content_length = length
        await delivery.begin(response)
        for piece in pieces:
            if not delivery.write(piece):
                await delivery.drain()
        return response

    return handler


async def test_chunks_of_our_own_end_as_aiohttps_do() -> None:
    async with served(sends(b"a", b"bc")) as port:
        reader, writer = await ask(port, "1.1")
        assert b"transfer-encoding: chunked" in (await reader.readuntil(b"\r\n\r\n")).lower()
        assert await reader.readuntil(b"0\r\n\r\n") == b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"0\r\n\r\n"), "the connection serves on"
        writer.close()


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
async def test_an_http_1_0_client_gets_bare_bytes_until_the_connections_end(fields: tuple[str, ...]) -> None:
    async with served(sends(b"a", b"bc")) as port:
        reader, writer = await ask(port, "1.0", *fields)
        received = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert b"transfer-encoding" not in received
        assert b"keep-alive" not in received
        assert await reader.read() == b"abc"
        writer.close()


async def test_a_known_length_is_sent_as_it_is() -> None:
    async with served(sends(b"a", b"bc", length=3)) as port:
        reader, writer = await ask(port, "1.1", "Connection: close")
        assert b"content-length: 3" in (await reader.readuntil(b"\r\n\r\n")).lower()
        assert await reader.read() == b"abc"
        writer.close()


async def test_a_client_that_has_gone_is_noticed_when_something_is_written() -> None:
    """Where its handler is not cancelled first."""
    gone: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response, delivery = web.StreamResponse(), Delivery(request)
        await delivery.begin(response)
        assert request.transport is not None
        request.transport.close()
        try:
            delivery.write(b"x")
        except DownstreamGoneError as error:
            gone.set_result(error)
        return response

    async with served(handler) as port:
        _, writer = await ask(port)
        assert isinstance(await gone, DownstreamGoneError)
        writer.close()


@dataclass
class Relayed:
    """What the router does, without the router. `ends`: how each request went."""

    server: Scripted
    port: int
    ends: list[str] = field(default_factory=list)


@asynccontextmanager
async def relayed(
    *answers: Answer, make_client: MakeClient = UpstreamClient, write_s: float = GUARD_S, hold_bytes: int = 2**20
) -> AsyncIterator[Relayed]:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        downstream = Downstream(request, hold_bytes=hold_bytes, write_s=write_s)
        try:
            async with client.request("GET", server.url) as upstream:
                await downstream.pass_on(upstream, CIMultiDict({"content-type": upstream.content_type}))
            made.ends.append("complete")
        except DownstreamGoneError as error:
            made.ends.append(str(error))
        except asyncio.CancelledError:
            made.ends.append("cancelled")
            raise
        assert downstream.response is not None
        return downstream.response

    async with scripted(*answers) as server, make_client(LIMITS) as client, served(handler) as port:
        made = Relayed(server, port)
        yield made


def events(count: int) -> list[bytes]:
    event = b"data: " + PIECE + b"\n\n"
    framed = b"%x\r\n%b\r\n" % (len(event), event)
    return [head(CHUNKED, b"content-type: " + CONTENT_TYPE.encode()), *[framed] * count, b"0\r\n\r\n"]


async def test_a_slow_client_stalls_its_own_upstream_and_nobody_else(make_client: MakeClient) -> None:
    async with relayed(events(1024), make_client=make_client) as at:
        slow, slow_writer = await ask(at.port)
        await slow.readuntil(b"\r\n\r\n")
        still, last = 0, -1
        while still < 500:
            await asyncio.sleep(0)
            still, last = (still + 1 if at.server.written == last else 0), at.server.written
        assert at.server.written < STUCK
        swift, swift_writer = await ask(at.port, "1.1", "Connection: close")
        assert (await swift.read()).count(b"data: ") == 1024
        assert at.ends == ["complete"]
        received = bytearray()
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += await slow.read(2**20)
        assert received.count(b"data: ") == 1024
        await eventually(lambda: at.ends == ["complete", "complete"])
        for writer in (slow_writer, swift_writer):
            writer.close()


@pytest.mark.parametrize("size", [0, 2**16, 2**16 + 1, 2**20])
async def test_an_answer_that_was_held_has_its_length(make_client: MakeClient, size: int) -> None:
    async with relayed([sized(b"x" * size)], make_client=make_client) as at:
        for _ in range(2):
            reader, writer = await ask(at.port)
            received = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert b"content-length: %d\r\n" % size in received
            assert b"transfer-encoding" not in received
            assert await reader.readexactly(size) == b"x" * size
            writer.close()
        assert at.ends == ["complete"] * 2


async def test_a_client_that_does_not_take_a_held_answer_is_given_up(make_client: MakeClient) -> None:
    """Its memory is not kept for ever."""
    async with relayed([sized(PIECE * 256)], make_client=make_client, write_s=0.1, hold_bytes=2**30) as at:
        _, writer = await ask(at.port)
        await eventually(lambda: at.ends in (["the client reads no more"], ["cancelled"]))
        writer.close()


async def test_a_client_that_reads_no_more_is_given_up(make_client: MakeClient) -> None:
    """It holds a place on a replica; the upstream is closed with it."""
    async with relayed(events(1024), make_client=make_client, write_s=0.1) as at:
        _, writer = await ask(at.port)
        await eventually(lambda: at.server.left == 1)
        await eventually(lambda: at.ends in (["the client reads no more"], ["cancelled"]))
        writer.close()


@pytest.mark.parametrize("steps", [[End.HANG], [*events(1)[:2], End.HANG]], ids=["before the first byte", "mid-stream"])
async def test_a_client_that_leaves_closes_the_upstream(make_client: MakeClient, steps: Answer) -> None:
    async with relayed(steps, make_client=make_client) as at:
        reader, writer = await ask(at.port)
        await eventually(lambda: at.server.heads)
        if len(steps) > 1:
            await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        await eventually(lambda: at.server.left == 1)
        await eventually(lambda: at.ends == ["cancelled"])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), min_size=1, max_size=8),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_events_come_through_whole_however_they_are_cut(payloads: list[bytes], cuts: list[int]) -> None:
    """Every chunk that the client gets ends with an event's end."""
    whole = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    pieces = [whole[a:b] for a, b in pairwise(sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))}))]
    framed = [b"%x\r\n%b\r\n" % (len(p), p) for p in pieces]

    async def run() -> None:
        async with relayed([events(0)[0], *framed, b"0\r\n\r\n"]) as at:
            reader, writer = await ask(at.port)
            await reader.readuntil(b"\r\n\r\n")
            received = b""
            while (size := int(await reader.readline(), 16)) > 0:
                received += await reader.readexactly(size)
                assert received.endswith(b"\n\n")
                await reader.readline()
            assert received == whole
            writer.close()

    asyncio.run(run())
