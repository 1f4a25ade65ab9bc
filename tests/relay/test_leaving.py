"""A client that leaves, in every phase of its request: its handler has ended and its upstream is closed, at once."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from hpc_router.relay.downstream import server
from hpc_router.relay.downstream.interface import Request, Response
from hpc_router.relay.sse import CONTENT_TYPE, PING
from hpc_router.relay.upstream.interface import address_of
from tests.relay.reference import server as server_aiohttp
from tests.relay.scripted import CHUNKED, Answer, End, head
from tests.relay.serving import PATIENT, Client, Relayed, relayed, served
from tests.support.relays import OWN, Listen, Relay
from tests.support.waiting import eventually

GUARD_S = 5.0
EVENTS = head(CHUNKED, b"content-type: " + CONTENT_TYPE)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
BIG = b"data: " + b"x" * 2**16 + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


PHASES: dict[str, tuple[Answer, bytes]] = {  # what the upstream says, and what the client waits for before it leaves
    "before the first byte": ([End.HANG], b""),
    "behind the head": ([EVENTS, End.HANG], b""),
    "inside the first event": ([EVENTS, chunk(b"data: "), End.HANG], b""),
    "between events": ([EVENTS, chunk(b"data: a\n\n"), End.HANG], b"data: a\n\n\r\n"),
    "inside an event": ([EVENTS, chunk(b"data: a\n\n"), chunk(b"data: "), End.HANG], b"data: a\n\n\r\n"),
    "before the last chunk": ([EVENTS, chunk(b"data: [DONE]\n\n"), End.HANG], b"data: [DONE]\n\n\r\n"),
    "inside the last chunk": ([EVENTS, chunk(b"data: [DONE]\n\n"), b"0\r\n", End.HANG], b"data: [DONE]\n\n\r\n"),
    "inside an answer that is held": ([head(b"content-length: 9"), b"abc", End.HANG], b""),
}


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize(("answer", "until"), PHASES.values(), ids=PHASES)
async def test_a_client_leaves(relay: Relay, answer: Answer, until: bytes, reset: bool) -> None:
    async with relayed(relay, answer) as at, Client(at.port) as client:
        await client.send(GET)
        await eventually(lambda: at.upstream.heads)
        if until:
            await client.until(until)
        if reset:
            client.reset()
        client.leave()
        await eventually(lambda: at.upstream.left == 1, within_s=GUARD_S)
        await eventually(lambda: at.ends == ["cancelled"], within_s=GUARD_S)


async def test_a_client_leaves_behind_a_long_body(relay: Relay) -> None:
    """The upstream reads nothing, so the relay is still busy with the body when the client leaves."""
    body = b"x" * 2**25
    async with relayed(relay, [End.PAUSE, End.READ], reads_bodies=False) as at, Client(at.port) as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body), body)
        await client.writer.drain()
        await eventually(lambda: at.upstream.heads)
        client.leave()
        await eventually(lambda: at.ends == ["cancelled"], within_s=GUARD_S)
        at.upstream.go_on.release()
        await eventually(lambda: at.upstream.left == 1, within_s=GUARD_S)


async def test_a_client_leaves_inside_its_body(relay: Relay) -> None:
    async with relayed(relay, [End.HANG]) as at, Client(at.port) as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
        await eventually(lambda: at.begun)
        client.leave()
        await eventually(lambda: at.ends == ["cancelled"] or at.ends == ["BadRequestError"], within_s=GUARD_S)
        assert at.upstream.connections == 0


async def stands_still(at: Relayed) -> None:
    """Nothing more is taken from the upstream."""
    still, last = 0, -1
    while still < 500:
        await asyncio.sleep(0)
        still, last = (still + 1 if at.upstream.written == last else 0), at.upstream.written


async def test_a_client_leaves_that_has_not_read() -> None:
    """While it is paused by back-pressure. The reference may learn of it from its limit on writing only."""
    answer: Answer = [EVENTS, *[chunk(BIG)] * 1024, End.HANG]
    async with relayed(OWN, answer) as at, Client(at.port, receives=2**12) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(GET)
        await stands_still(at)
        client.leave()
        await eventually(lambda: at.ends == ["cancelled"], within_s=GUARD_S)
        await eventually(lambda: at.upstream.left == 1, within_s=GUARD_S)


@asynccontextmanager
async def full_backlog() -> AsyncIterator[str]:
    """The address of one that accepts nobody: connecting to it does not end."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        queued = []
        for _ in range(8):
            made = socket.socket()
            made.setblocking(False)
            made.connect_ex(sock.getsockname())
            queued.append(made)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            for made in queued:
                made.close()


async def test_a_client_leaves_while_the_upstream_is_connected_to(relay: Relay) -> None:
    ended, begun = asyncio.Event(), asyncio.Event()

    async def handler(request: Request) -> Response | None:
        begun.set()
        try:
            async with upstream.request("GET", address_of(url), "/"):
                pass
        except asyncio.CancelledError:
            ended.set()
            raise
        return Response(200)

    async with (
        full_backlog() as url,
        relay.make_client(PATIENT) as upstream,
        served(relay.listen, handler) as port,
        Client(port) as client,
        asyncio.timeout(GUARD_S),
    ):
        await client.send(GET)
        await begun.wait()
        client.leave()
        await ended.wait()


# Pauses.


async def test_pauses_are_filled_between_whole_events(relay: Relay) -> None:
    """From the first event on, and never inside one; nothing follows the end."""
    answer: Answer = [EVENTS, chunk(b"data: a\n\nda"), End.PAUSE, chunk(b"ta: b\n\n"), End.PAUSE, b"0\r\n\r\n"]
    async with relayed(relay, answer, ping_s=0.01) as at, Client(at.port) as client:
        await client.send(GET)
        await client.head()
        ping = b"8\r\n: ping\n\n\r\n"
        received = await client.until(ping)
        assert received.startswith(chunk(b"data: a\n\n"))
        at.upstream.go_on.release()
        while b"data: b" not in received:
            received += await client.until(b"\n\n\r\n")
        received += await client.until(ping)
        at.upstream.go_on.release()
        received += await client.until(b"0\r\n\r\n")
        assert received.replace(ping, b"") == chunk(b"data: a\n\n") + chunk(b"data: b\n\n") + b"0\r\n\r\n"
        await client.send(GET)
        assert (await client.head()).startswith(b"http/1.1 200"), "nothing was written behind the end"


@pytest.mark.parametrize(
    "before",
    [[EVENTS], [EVENTS, chunk(b"data: ")], [head(CHUNKED), chunk(b"abc")]],
    ids=["a head", "half an event", "no events"],
)
async def test_no_comment_comes_before_the_first_event_or_without_events(relay: Relay, before: list[bytes]) -> None:
    """However long it takes: another client gets some meanwhile."""
    answer: Answer = [*before, End.PAUSE, chunk(b"z\n\n"), b"0\r\n\r\n"]
    other: Answer = [EVENTS, chunk(b"data: a\n\n"), End.HANG]
    async with (
        relayed(relay, answer, ping_s=0.01) as at,
        relayed(relay, other, ping_s=0.01) as clock,
        Client(at.port) as client,
        Client(clock.port) as ticking,
    ):
        await client.send(GET)
        await eventually(lambda: at.upstream.written == sum(map(len, before)))
        await ticking.send(GET)
        for _ in range(5):
            await ticking.until(b": ping\n\n\r\n")
        at.upstream.go_on.release()
        received = await client.until(b"z\n\n" if before[0] != EVENTS else b"0\r\n\r\n")
        assert PING not in received


async def test_a_client_that_reads_nothing_gets_no_comments(relay: Relay) -> None:
    """Another one gets some meanwhile."""
    stuck: Answer = [EVENTS, *[chunk(BIG)] * 1024, b"0\r\n\r\n"]
    other: Answer = [EVENTS, chunk(b"data: a\n\n"), End.HANG]
    async with (
        relayed(relay, stuck, ping_s=0.01) as at,
        relayed(relay, other, ping_s=0.01) as clock,
        Client(at.port, receives=2**12) as client,
        Client(clock.port) as ticking,
    ):
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(GET)
        await stands_still(at)
        await ticking.send(GET)
        for _ in range(20):
            await ticking.until(b": ping\n\n\r\n")
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = await client.until(b"\r\n0\r\n\r\n")
        assert received.count(b"data: ") == 1024
        assert received.count(PING) < 20


# The end of serving.


async def test_idle_connections_are_closed_at_the_end(listen: Listen) -> None:
    async def handler(request: Request) -> Response:
        return Response(200, b"", b"ok")

    async with served(listen, handler) as port:
        silent, idle, slow = Client(port), Client(port), Client(port)
        for client in (silent, idle, slow):
            await client.__aenter__()
        await idle.send(GET)
        await idle.until(b"ok")
        await slow.send(GET[:10])
        await asyncio.sleep(0)
    for client in (silent, idle, slow):
        await client.rest()
        await client.__aexit__(None, None, None)


async def test_a_handler_that_is_done_in_time_has_its_answer_read(listen: Listen) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request: Request) -> Response:
        begun.set()
        await go_on.wait()
        return Response(200, b"", b"ok")

    async with asyncio.TaskGroup() as tasks:

        async def serve() -> None:
            async with served(listen, handler) as port:
                at.set_result(port)
                await stop.wait()
            assert go_on.is_set()

        at: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        serving = tasks.create_task(serve())
        async with Client(await at) as client:
            await client.send(GET)
            await begun.wait()
            stop.set()
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(go_on.set)
            received = await client.rest()
            assert received.startswith(b"HTTP/1.1 200")
            assert received.endswith(b"ok")
        await serving


async def test_handlers_that_go_on_are_cancelled(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits, one whose client reads nothing, and one whose client still sends; nothing is left pending."""
    monkeypatch.setattr(server, "SHUTDOWN_S", 0.05)
    monkeypatch.setattr(server_aiohttp, "SHUTDOWN_S", 0.05)
    before, ended, begun = asyncio.all_tasks(), 0, 0

    async def handler(request: Request) -> Response | None:
        nonlocal ended, begun
        begun += 1
        try:
            if request.method == "POST":
                return Response(413)
            if request.path == "/full":
                request.start_response(200, b"", length=None)
                while True:
                    if not request.write(b"x" * 2**16):
                        await request.drain()
            await asyncio.Event().wait()
        finally:
            ended += 1
        return None

    async with asyncio.timeout(30):
        async with served(relay.listen, handler) as port:
            clients = [Client(port) for _ in range(3)]
            for client in clients:
                await client.__aenter__()
            await clients[0].send(GET)
            await clients[1].send(b"GET /full HTTP/1.1\r\nHost: x\r\n\r\n")
            await clients[2].send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\na")
            await eventually(lambda: begun == 3)
        assert ended == 3
    for client in clients:
        client.leave()
        await client.__aexit__(None, None, None)
    await eventually(lambda: asyncio.all_tasks() <= before)
