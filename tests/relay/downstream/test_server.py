"""The client side against clients that send anything: refused or bounded, and nobody else disturbed."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from hpc_router.errors import BadRequestError, BodyTooLargeError, RequestTimeoutError, UnsupportedEncodingError
from hpc_router.relay.downstream.interface import Handler, Request, Response, check_encoding
from hpc_router.relay.downstream.request_parser import MAX_STREAMED_BYTES, MAX_WAITING
from hpc_router.relay.downstream.server import listening
from hpc_router.relay.headers import Headers
from tests.relay.downstream.support import GET, ODD, POST, REFUSED, SILENT
from tests.relay.serving import MAX_BODY, STUCK, Client, served
from tests.support.relays import OWN, Listen, Relay
from tests.support.waiting import GUARD_S, eventually


async def echo(request: Request) -> Response | None:
    """The body it was sent, as a stream."""
    try:
        body = await request.read(limit_s=0.05 if request.path == "/hasty" else GUARD_S)
    except BodyTooLargeError:
        return Response(413)
    except RequestTimeoutError:
        return Response(408)
    except UnsupportedEncodingError:
        return Response(415)
    except BadRequestError:
        return Response(400)
    request.start_response(200, b"", length=None)
    request.write(b"<%b>" % body)
    return None


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"zstd", b"x-any", b"identity, gzip"])
def test_every_content_coding_but_identity_is_refused(coding: bytes) -> None:
    check_encoding(Headers([(b"content-encoding", b"Identity")]))
    with pytest.raises(UnsupportedEncodingError, match="without Content-Encoding"):
        check_encoding(Headers([(b"content-encoding", b"identity"), (b"content-encoding", coding)]))


async def serves_on(port: int) -> None:
    async with Client(port) as client:
        await client.send(POST + b"Content-Length: 2\r\n\r\nok")
        assert await client.status() == 200
        assert b"<ok>" in await client.until(b"0\r\n\r\n")


@pytest.mark.parametrize(("data", "expected", "lenient"), REFUSED.values(), ids=REFUSED)
async def test_what_cannot_be_taken_is_refused(relay: Relay, data: bytes, expected: int, lenient: set[int]) -> None:
    allowed = {expected} if relay is OWN else {expected} | lenient
    async with served(relay.listen, echo) as port, Client(port) as client:
        await client.send(data)
        await serves_on(port)
        if SILENT not in allowed:
            assert await client.status() in allowed


@pytest.mark.parametrize("name", [n for n, (data, _, _) in REFUSED.items() if len(data) < 200])
async def test_it_is_refused_byte_by_byte_as_well_and_nothing_after_it_is_served(name: str) -> None:
    """The connection ends with the refusal: nobody could tell where the next request begins."""
    data, expected, _ = REFUSED[name]
    async with served(OWN.listen, echo) as port, Client(port) as client:
        await client.send(*[data[i : i + 1] for i in range(len(data))])
        if expected != 408:
            await client.send(b"\r\n\r\n" + GET + b"\r\n")
        assert await client.status() == expected
        client.writer.write_eof()
        assert b"HTTP/1.1 200" not in await client.rest()


@pytest.mark.parametrize("bytewise", [False, True], ids=["at once", "bytewise"])
@pytest.mark.parametrize(("data", "answer"), ODD.values(), ids=ODD)
async def test_what_is_odd_is_served_again_and_again(data: bytes, answer: bytes, bytewise: bool) -> None:
    """Over one connection, so that its end was found. Not by the reference where it does not know how."""
    pieces = [data[i : i + 1] for i in range(len(data))] if bytewise and len(data) < 1000 else [data]
    async with served(OWN.listen, echo) as port, Client(port) as client:
        for _ in range(4):
            await client.send(*pieces)
            assert await client.status() == 200
            assert answer + b"\r\n0\r\n\r\n" in await client.until(b"0\r\n\r\n")


async def test_a_tunnel_is_not_built() -> None:
    """What follows is no request of ours, whatever it looks like. The reference takes it for one."""
    async with served(OWN.listen, echo) as port, Client(port) as client:
        await client.send(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + GET + b"\r\n")
        await serves_on(port)
        client.writer.write_eof()
        assert (await client.rest()).count(b"HTTP/1.1 ") <= 1


async def test_garbage_after_a_request_does_not_spoil_its_answer() -> None:
    """It does with the reference, when both have come together."""
    async with served(OWN.listen, echo) as port, Client(port) as client:
        await client.send(POST + b"Content-Length: 2\r\n\r\nok" + b"\0garbage\r\n\r\n")
        assert await client.status() == 200
        assert b"<ok>" in await client.reader.readuntil(b"0\r\n\r\n")
        assert await client.status() == 400


async def test_headers_that_do_not_come_are_not_waited_for(listen: Listen) -> None:
    """However slowly they come: the time for all of them is limited. The reference answers before it closes."""
    async with served(listen, echo, keep_alive_s=0.1) as port, Client(port) as client:
        await client.send(GET, b"A: b\r\n")
        assert b"200" not in await client.rest()
        await serves_on(port)


async def test_headers_that_trickle_are_not_waited_for() -> None:
    """Not by the reference, which has no such limit."""
    async with served(OWN.listen, echo, keep_alive_s=0.1) as port, Client(port) as client:
        await client.send(GET)
        ended = asyncio.create_task(client.rest())
        while not ended.done():
            await client.send(b"A: b\r\n")
            await asyncio.wait([ended], timeout=0.01)
        assert await ended == b""
        await serves_on(port)


async def test_an_idle_connection_is_closed(listen: Listen) -> None:
    async with served(listen, echo, keep_alive_s=0.1) as port, Client(port) as client:
        await client.send(GET + b"\r\n")
        assert b"<>" in await client.rest()


async def test_a_connection_without_a_word_is_closed() -> None:
    """Not by the reference."""
    async with served(OWN.listen, echo, keep_alive_s=0.1) as port, Client(port) as client:
        assert await client.rest() == b""


async def test_pipelined_requests_are_answered_in_order(listen: Listen) -> None:
    bodies = [b"%d" % i for i in range(40)]
    whole = b"".join(POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) for body in bodies)
    async with served(listen, echo) as port, Client(port) as client:
        await client.send(whole[:100], whole[100:])
        for body in bodies:
            assert await client.status() == 200
            assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(b"<%b>\r\n0\r\n\r\n" % body)


async def test_requests_beyond_the_bound_are_refused_after_those_within_it() -> None:
    async with served(OWN.listen, echo) as port, Client(port) as client:
        await client.send((GET + b"\r\n") * (MAX_WAITING + 1))
        for _ in range(MAX_WAITING):
            assert await client.status() == 200
            await client.reader.readuntil(b"0\r\n\r\n")
        assert await client.status() == 429
        await serves_on(port)


async def test_bodies_that_wait_are_bounded() -> None:
    """A client that sends and sends behind a request that takes its time."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request: Request) -> Response:
        started.set()
        await go_on.wait()
        return Response(200, b"", b"%d" % len(await request.read()))

    async with served(OWN.listen, handler) as port, Client(port) as client:
        await client.send(GET + b"\r\n")
        await started.wait()
        await client.send(*[POST + b"Content-Length: %d\r\n\r\n" % MAX_BODY + b"x" * MAX_BODY] * 10)
        go_on.set()
        answers = [await client.status() for _ in range(3)]
        assert answers == [200, 200, 200] or answers[-1] == 429
        client.writer.write_eof()
        assert b"HTTP/1.1 429 " in await client.rest()


async def test_who_expects_to_go_on_is_told_to(listen: Listen) -> None:
    async with served(listen, echo) as port, Client(port) as client:
        for _ in range(3):
            await client.send(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
            assert await client.head() == b"http/1.1 100 continue\r\n\r\n"
            await client.send(b"ok")
            assert await client.status() == 200
            assert b"<ok>" in await client.until(b"0\r\n\r\n")


async def test_many_slow_clients_hold_up_nobody(listen: Listen) -> None:
    async with served(listen, echo) as port, AsyncExitStack() as slow:
        for _ in range(50):
            client = await slow.enter_async_context(Client(port))
            await client.send(GET)
        await serves_on(port)


@pytest.mark.parametrize("framing", [b"Content-Length: 104857600\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
async def test_a_long_body_is_refused_in_bounded_memory_and_the_client_reads_why(
    framing: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not even look for the answer before it has sent all."""
    kept = 0

    async def handler(request: Request) -> Response | None:
        nonlocal kept
        try:
            await request.read()
        except BodyTooLargeError:
            kept = len(b"".join(request.chunks))  # type: ignore[attr-defined]
            return Response(413, b"", b"too large")
        return await echo(request)

    piece = b"x" * 2**20
    async with served(OWN.listen, handler) as port, Client(port) as client:
        client.writer.write(POST + framing)
        for _ in range(100):
            client.writer.write(piece if b"Length" in framing else b"100000\r\n%b\r\n" % piece)
            await client.writer.drain()
        assert await client.status() == 413
        await serves_on(port)
        assert (await client.rest()).startswith(b"too large")
    assert kept == 0


async def test_a_client_that_asks_and_never_reads_is_cut_after_the_limit(listen: Listen) -> None:
    written, ended = 0, asyncio.Event()

    async def handler(request: Request) -> Response | None:
        nonlocal written
        if request.path == "/":
            return await echo(request)
        try:
            request.start_response(200, b"", length=None)
            while True:
                written += 2**16
                if not request.write(b"x" * 2**16):
                    await request.drain(limit_s=0.1)
        finally:
            ended.set()

    async with served(listen, handler) as port, Client(port) as client:
        await client.send(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await eventually(lambda: written)
        await serves_on(port)
        await ended.wait()
        assert written < STUCK


async def test_a_client_that_leaves_its_half_and_never_reads_is_not_kept() -> None:
    """It has closed its sending half; the rest of its answer has nobody to wait for. The reference waits for ever."""
    ended, full = asyncio.Event(), asyncio.Event()

    async def handler(request: Request) -> Response | None:
        try:
            request.start_response(200, b"", length=None)
            while request.write(b"x" * 2**16):
                await asyncio.sleep(0)
            full.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
        return None

    async with served(OWN.listen, handler) as port, Client(port, receives=2**12) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.get()
        async with asyncio.timeout(GUARD_S):
            await full.wait()
            client.writer.write_eof()
            await ended.wait()


async def test_a_client_that_closes_its_half_behind_a_request_is_served_or_left(listen: Listen) -> None:
    async with served(listen, echo) as port, Client(port) as client:
        await client.send(GET + b"\r\n")
        client.writer.write_eof()
        received = await client.rest()
        assert received == b"" or b"<>" in received
        await serves_on(port)


async def test_an_answer_to_an_answer_breaks_the_connection() -> None:
    """As when a handler fails in the midst of a stream: a second head would look like a part of the body."""

    async def handler(request: Request) -> Response:
        request.start_response(200, b"", length=None)
        request.write(b"a")
        return Response(500, b"", b"failed")

    async with served(OWN.listen, handler) as port, Client(port) as client:
        await client.get()
        received = await client.rest()
        assert b"failed" not in received
        assert not received.endswith(b"0\r\n\r\n")


async def test_an_aborted_answer_ends_the_connection_quietly(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the request's body has not come."""

    async def handler(request: Request) -> Response | None:
        request.start_response(200, b"", length=None)
        request.abort()
        return None

    async with served(relay.listen, handler) as port, Client(port) as client:
        await client.send(POST + b"Content-Length: 5\r\n\r\n")
        assert not (await client.rest()).endswith(b"0\r\n\r\n")
    if relay is OWN:
        assert not caplog.records


async def test_a_handler_that_fails_ends_its_connection_only(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Request) -> Response | None:
        if request.method == "GET":
            raise LookupError("a bug")
        return await echo(request)

    async with served(relay.listen, handler) as port, Client(port) as client:
        await client.get()
        assert b"200" not in await client.rest()
        await serves_on(port)
    assert any(record.levelname == "ERROR" for record in caplog.records)


@pytest.mark.parametrize("status", [204, 304])
async def test_what_has_no_body_has_none(listen: Listen, status: int) -> None:
    async def handler(request: Request) -> Response:
        return Response(status)

    async with served(listen, handler) as port, Client(port) as client:
        for _ in range(2):
            await client.get()
            head = await client.head()
            assert head.startswith(b"http/1.1 %d " % status)
            assert b"transfer-encoding" not in head


@pytest.mark.parametrize("target", ["http://other:1/a%20b?c=%2F", "/a%20b?c=%2F"])
async def test_a_target_in_either_form_is_path_and_query(target: str) -> None:
    """The reference hands the whole address on."""
    seen: list[tuple[str, str, str]] = []

    async def handler(request: Request) -> Response:
        seen.append((request.path, request.query, request.target))
        return Response(200)

    async with served(OWN.listen, handler) as port, Client(port) as client:
        await client.send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target.encode())
        assert await client.status() == 200
    assert seen == [("/a b", "c=%2F", "/a%20b?c=%2F")]


@pytest.mark.parametrize("target", ["//a%20b//c///?d=//e", "/a%20b/c/?d=//e", "http://other:1//a%20b/c//?d=//e"])
async def test_doubled_slashes_in_a_path_are_one(listen: Listen, target: str) -> None:
    """Those of the query stay, and a cached head has the same path."""
    seen: list[tuple[str, str]] = []

    async def handler(request: Request) -> Response:
        seen.append((request.path, request.query))
        return Response(200)

    async with served(listen, handler) as port, Client(port) as client:
        for _ in range(3):
            await client.send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target.encode())
            assert await client.status() == 200
    assert seen == [("/a b/c/", "d=//e")] * 3


class Slow:
    """Reads a streamed body only as far as it is told to. `sizes`: lengths of the parts that it took."""

    def __init__(self) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self.sizes: list[int] = []

    async def __call__(self, request: Request) -> Response:
        self.begun.set()
        await self.go_on.wait()
        async for part in request.body_chunks(limit_s=GUARD_S):
            self.sizes.append(len(part))
        return Response(200, body=b"%d" % sum(self.sizes))


@asynccontextmanager
async def streaming(handler: Handler) -> AsyncIterator[int]:
    """Serves POST requests with streamed bodies; yields the port."""
    sock = socket.create_server(("127.0.0.1", 0))
    async with listening(handler, sock, max_body=MAX_BODY, streams_body=lambda head: head.method == "POST"):
        yield sock.getsockname()[1]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_streamed_body_is_taken_no_faster_than_it_is_read(chunked: bool) -> None:
    """It is longer than any other body may be, and than the sockets' buffers; the next request is served as well."""
    slow = Slow()
    head = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % STUCK
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (STUCK, b"x" * STUCK) if chunked else b"x" * STUCK
    async with streaming(slow) as port, Client(port) as client:
        await client.send(POST + head)
        sending = asyncio.create_task(client.send(body))
        await slow.begun.wait()
        await sending
        client.writer.transport.set_write_buffer_limits(0)
        draining = asyncio.create_task(client.writer.drain())
        await asyncio.wait({draining}, timeout=0.2)
        assert not draining.done(), "the server has read what its handler did not want yet"
        slow.go_on.set()
        await draining
        assert await client.status() == 200
        assert await client.until(b"%d" % STUCK) == b"%d" % STUCK
        assert max(slow.sizes) <= MAX_STREAMED_BYTES + 2**18
        await client.send(POST + b"Content-Length: 2\r\n\r\nok")
        assert await client.status() == 200


async def test_a_streamed_body_may_be_left_unread() -> None:
    """The response is sent, and the connection is closed if the body is not complete."""

    async def refuse(request: Request) -> Response:
        return Response(401)

    async with streaming(refuse) as port:
        for size in (2, STUCK):
            async with Client(port) as client:
                await client.send(POST + b"Content-Length: %d\r\n\r\n" % size + b"x" * min(size, 2**20))
                assert await client.status() == 401
        async with Client(port) as client:
            body = b"x" * (2 * MAX_STREAMED_BYTES)
            await client.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert await client.status() == 401


async def test_a_streamed_body_that_stops_is_not_waited_for() -> None:
    async def hasty(request: Request) -> Response:
        try:
            async for _ in request.body_chunks(limit_s=0.05):
                pass
        except RequestTimeoutError:
            return Response(408)
        return Response(200)

    async with streaming(hasty) as port, Client(port) as client:
        await client.send(POST + b"Content-Length: 20\r\n\r\nx")
        assert await client.status() == 408


async def test_a_client_that_waits_is_told_to_send_a_streamed_body() -> None:
    slow = Slow()
    slow.go_on.set()
    async with streaming(slow) as port, Client(port) as client:
        await client.send(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await client.status() == 100
        await client.send(b"ok")
        assert await client.status() == 200
