"""The client side against clients that send anything: refused or bounded, and nobody else disturbed."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from aiohttp import web

from hpc_router.errors import BadRequestError, BodyTooLargeError, RequestTimeoutError
from hpc_router.relay.delivery import Delivery
from hpc_router.relay.server import listening, read_body
from tests.waiting import GUARD_S

MAX_BODY = 2**16
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def echo(request: web.BaseRequest) -> web.StreamResponse:
    """The body it was sent, written past aiohttp's writer."""
    try:
        body = await read_body(request, limit_s=0.2)
    except BodyTooLargeError:
        return web.Response(status=413)
    except RequestTimeoutError:
        return web.Response(status=408)
    except BadRequestError:
        return web.Response(status=400)
    response, delivery = web.StreamResponse(), Delivery(request)
    await delivery.begin(response)
    delivery.write(b"<%b>" % body)
    return response


@asynccontextmanager
async def echoing(*, keep_alive_s: float = GUARD_S) -> AsyncIterator[int]:
    sock = socket.create_server(("127.0.0.1", 0))
    async with listening(echo, sock, max_body=MAX_BODY, keep_alive_s=keep_alive_s):
        yield sock.getsockname()[1]


@asynccontextmanager
async def sending(port: int, *pieces: bytes) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0)
    try:
        yield reader
    finally:
        writer.transport.abort()


async def status(reader: asyncio.StreamReader) -> int:
    return int((await reader.readline()).split(b" ")[1])


async def serves_on(port: int) -> None:
    async with sending(port, POST + b"Content-Length: 2\r\n\r\nok") as reader:
        assert b"<ok>" in await reader.readuntil(b"0\r\n\r\n")


REFUSED = {
    "garbage": (400, b"\0\1\2garbage\r\n\r\n"),
    "length and chunks": (400, POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x"),
    "chunks and length": (400, POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\nGET /x"),
    "two lengths": (400, POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
    "a list of lengths": (400, POST + b"Content-Length: 3, 3\r\n\r\nabc"),
    "a signed length": (400, POST + b"Content-Length: +3\r\n\r\nabc"),
    "a negative length": (400, POST + b"Content-Length: -3\r\n\r\nabc"),
    "chunked not last": (400, POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
    "an unknown coding": (400, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "a bad chunk size": (400, POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n"),
    "a chunk longer than its size": (400, POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n"),
    "bare LF": (400, b"POST / HTTP/1.1\nHost: x\nContent-Length: 3\n\nabc"),
    "a folded header": (400, POST + b"A: b\r\n c\r\nContent-Length: 0\r\n\r\n"),
    "space before the colon": (400, POST + b"Content-Length : 3\r\n\r\nabc"),
    "NUL in a value": (400, GET + b"A: b\0c\r\n\r\n"),
    "a header line of 64 KiB": (400, GET + b"A: " + b"x" * 2**16 + b"\r\n\r\n"),
    "a request line of 64 KiB": (400, b"GET /" + b"x" * 2**16 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "ten thousand headers": (400, GET + b"A: b\r\n" * 10_000 + b"\r\n"),
    "a body that says it is too long": (413, POST + b"Content-Length: 104857600\r\n\r\n" + b"x" * 2**20),
    "a body that turns out too long": (
        413,
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"x" * 2**16 + b"\r\n") * 2,
    ),
    "a body that does not come": (408, POST + b"Content-Length: 3\r\n\r\na"),
    "a compressed body": (400, POST + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"),
}


@pytest.mark.parametrize(("expected", "data"), REFUSED.values(), ids=REFUSED)
async def test_what_cannot_be_taken_is_refused(expected: int, data: bytes) -> None:
    async with echoing() as port, sending(port, data) as reader:
        assert await status(reader) == expected
        await serves_on(port)


async def test_headers_that_do_not_come_are_not_waited_for() -> None:
    """However slowly they come: the time for all of them is limited."""
    async with echoing(keep_alive_s=0.1) as port, sending(port, GET, b"A: b\r\n") as reader:
        assert await reader.read() == b""
        await serves_on(port)


async def test_an_idle_connection_is_closed() -> None:
    async with echoing(keep_alive_s=0.1) as port, sending(port, GET + b"\r\n") as reader:
        assert b"<>" in await reader.read()


async def test_pipelined_requests_are_answered_in_order() -> None:
    bodies = [b"%d" % i for i in range(40)]
    whole = b"".join(POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) for body in bodies)
    async with echoing() as port, sending(port, whole[:100], whole[100:]) as reader:
        for body in bodies:
            assert (await reader.readuntil(b"0\r\n\r\n")).endswith(b"<%b>\r\n0\r\n\r\n" % body)


async def test_who_expects_to_go_on_is_told_to() -> None:
    async with echoing() as port, sending(port, POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n") as reader:
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_many_slow_clients_hold_up_nobody() -> None:
    async with echoing() as port, AsyncExitStack() as slow:
        for _ in range(50):
            await slow.enter_async_context(sending(port, GET))
        await serves_on(port)
