"""A response's body straight into the client's connection, seen from the client's side of the socket."""

import asyncio
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.relay.downstream.interface import Handler
from hpc_router.relay.sse import CONTENT_TYPE
from tests.relay.scripted import CHUNKED, Answer, End, head, sized
from tests.relay.serving import STUCK, Client, relayed, sends, served
from tests.support.relays import OWN, Listen, Relay
from tests.support.waiting import eventually

PIECE = b"x" * 2**16
GONE = (["the client does not read"], ["cancelled"])
TYPE = b"content-type: " + CONTENT_TYPE
EVENTS = head(CHUNKED, TYPE)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def events(count: int) -> list[bytes]:
    return [EVENTS, *[chunk(b"data: " + PIECE + b"\n\n")] * count, b"0\r\n\r\n"]


async def test_chunks_end_and_the_connection_serves_on(listen: Listen) -> None:
    async with served(listen, sends(b"a", b"bc")) as port, Client(port) as client:
        for _ in range(2):
            await client.get()
            assert b"\r\ntransfer-encoding: chunked\r\n" in await client.head()
            assert await client.until(b"0\r\n\r\n") == b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
async def test_an_http_1_0_client_gets_bare_bytes_until_the_connections_end(
    listen: Listen, fields: tuple[str, ...]
) -> None:
    async with served(listen, sends(b"a", b"bc")) as port, Client(port) as client:
        await client.get(*fields, version="1.0")
        received = await client.head()
        assert b"transfer-encoding" not in received
        assert b"keep-alive" not in received
        assert await client.rest() == b"abc"


async def test_a_known_length_is_sent_as_it_is(listen: Listen) -> None:
    async with served(listen, sends(b"a", b"bc", length=3)) as port, Client(port) as client:
        await client.get("Connection: close")
        assert b"\r\ncontent-length: 3\r\n" in await client.head()
        assert await client.rest() == b"abc"


@pytest.mark.parametrize("handler", [sends(b"abc"), sends(b"abc", length=3)], ids=["stream", "sized"])
async def test_the_answer_to_head_is_a_head(listen: Listen, handler: Handler) -> None:
    async with served(listen, handler) as port, Client(port) as client:
        for _ in range(2):
            await client.send(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await client.status() == 200
        await client.get("Connection: close")
        assert await client.status() == 200
        assert b"abc" in await client.rest()


async def test_a_slow_client_stalls_its_own_upstream_and_nobody_else(relay: Relay) -> None:
    async with relayed(relay, events(1024)) as at, Client(at.port) as slow, Client(at.port) as swift:
        await slow.get()
        await slow.head()
        still, last = 0, -1
        while still < 500:
            await asyncio.sleep(0)
            still, last = (still + 1 if at.upstream.written == last else 0), at.upstream.written
        assert at.upstream.written < STUCK
        await swift.get("Connection: close")
        assert (await swift.rest()).count(b"data: ") == 1024
        assert at.ends == ["complete"]
        assert (await slow.until(b"\r\n0\r\n\r\n")).count(b"data: ") == 1024
        await eventually(lambda: at.ends == ["complete", "complete"])


@pytest.mark.parametrize("size", [0, 2**16, 2**16 + 1, 2**20])
async def test_an_answer_that_was_held_has_its_length(relay: Relay, size: int) -> None:
    async with relayed(relay, [sized(b"x" * size)]) as at, Client(at.port) as client:
        for _ in range(3):
            await client.get()
            received = await client.head()
            assert b"\r\ncontent-length: %d\r\n" % size in received
            assert b"transfer-encoding" not in received
            assert await client.reader.readexactly(size) == b"x" * size
        assert at.ends == ["complete"] * 3


async def test_an_answer_that_is_too_long_to_be_held_is_streamed(relay: Relay) -> None:
    async with relayed(relay, [sized(b"x" * 2**20)], buffer_bytes=2**10) as at, Client(at.port) as client:
        await client.get(version="1.0")
        assert b"content-length" not in await client.head()
        assert await client.rest() == b"x" * 2**20


@pytest.mark.parametrize("buffer_bytes", [2**30, 2**10], ids=["held", "streamed"])
async def test_a_client_that_does_not_take_an_answer_is_given_up(relay: Relay, buffer_bytes: int) -> None:
    """Its memory is not kept for ever."""
    answer: Answer = [sized(PIECE * 256)]
    async with relayed(relay, answer, write_s=0.1, buffer_bytes=buffer_bytes) as at, Client(at.port) as client:
        await client.get()
        await eventually(lambda: at.ends in GONE)


async def test_a_client_that_reads_no_more_is_given_up(relay: Relay) -> None:
    """It holds a place on a replica; the upstream is closed with it, and others are served meanwhile."""
    async with relayed(relay, events(1024), [sized(b"ok")], write_s=0.1) as at:
        async with Client(at.port) as stuck, Client(at.port) as other:
            await stuck.get()
            await eventually(lambda: at.upstream.written)
            await other.get("Connection: close")
            assert (await other.rest()).endswith(b"ok")
            await eventually(lambda: at.upstream.left == 1)
            await eventually(lambda: any(end in at.ends for end in ("the client does not read", "cancelled")))
        assert at.upstream.written < STUCK


@pytest.mark.parametrize(
    ("answer", "last"),
    [
        ([EVENTS, chunk(b"data: a\n\ndata: b"), End.RESET], b"event: error\n\n\r\n0\r\n\r\n"),
        ([EVENTS, chunk(b"data: a\n\ndata: b"), b"0\r\n\r\n"], b"event: error\n\n\r\n0\r\n\r\n"),
        ([head(CHUNKED), chunk(PIECE), End.RESET], b""),
    ],
    ids=["events", "inside an event", "no events"],
)
async def test_a_failure_after_the_beginning_shows(relay: Relay, answer: Answer, last: bytes) -> None:
    async with relayed(relay, answer, buffer_bytes=10) as at, Client(at.port) as client:
        await client.get()
        assert await client.status() == 200
        if last:
            received = await client.until(last)
            assert b"data: a" in received
            assert b"data: b" not in received
        else:
            assert not (await client.rest()).endswith(b"0\r\n\r\n")
        await eventually(lambda: at.ends == ["UpstreamError"])


COMPLETE = {
    "[DONE] and LF": b"data: [DONE]\n",
    "[DONE] and CRLF": b"data: [DONE]\r\n",
    "[DONE] and CR": b"data: [DONE]\r",
    "[DONE] alone": b"data: [DONE]",
    "a chunk": b'data: {"choices": []}\n',
    "a named event": b'event: message_stop\ndata: {"type": "message_stop"}\n',
}
FRAMINGS = {
    "chunked": lambda body: [EVENTS, *map(chunk, body), b"0\r\n\r\n"],
    "sized": lambda body: [head(b"content-length: %d" % len(b"".join(body)), TYPE), *body],
    "until the close": lambda body: [head(TYPE), *body, End.CLOSE],
}


@pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS)
@pytest.mark.parametrize("first", [b"data: a\n\n", b""], ids=["after another", "alone"])
@pytest.mark.parametrize("last", COMPLETE.values(), ids=COMPLETE)
async def test_a_last_event_without_its_blank_line_is_complete_at_a_clean_end(
    relay: Relay, framing: Callable[[list[bytes]], Answer], first: bytes, last: bytes
) -> None:
    """The blank line is added: readers drop an event that lacks it."""
    body = [first, last] if first else [last]
    async with relayed(relay, framing(body)) as at, Client(at.port) as client:
        await client.get("Connection: close", version="1.0")
        received = await client.head() + await client.rest()
        assert received.split(b" ", 2)[1] == b"200"
        whole = received.partition(b"\r\n\r\n")[2]
        assert whole.rstrip(b"\r\n") == (first + last).rstrip(b"\r\n")
        assert whole.endswith((b"\n\n", b"\n\r\n", b"\r\r"))
        assert at.ends == ["complete"]


@pytest.mark.parametrize("last", [b'data: {"choices": [', b"data: [DON", b"event: message_stop\n"])
async def test_a_cut_last_event_is_an_error_at_a_clean_end(relay: Relay, last: bytes) -> None:
    answer: Answer = [EVENTS, chunk(b"data: a\n\n"), chunk(last), b"0\r\n\r\n"]
    async with relayed(relay, answer) as at, Client(at.port) as client:
        await client.get()
        await client.head()
        assert await client.until(b"0\r\n\r\n") == chunk(b"data: a\n\n") + chunk(b"event: error\n\n") + b"0\r\n\r\n"
        assert at.ends == ["UpstreamError"]


@pytest.mark.parametrize("field", [b"content-type: application/json", b"content-type: text/plain", b"x-nothing: 1"])
async def test_a_stream_passes_as_it_comes_whatever_its_type(relay: Relay, field: bytes) -> None:
    """The first piece is there while the upstream waits with the second; a failure breaks the connection."""
    answer: Answer = [head(CHUNKED, field), chunk(b"one"), End.PAUSE, chunk(b"two"), End.PAUSE, End.RESET]
    async with relayed(relay, answer, stream=True) as at, Client(at.port) as client:
        await client.get()
        assert b"\r\ntransfer-encoding: chunked\r\n" in await client.head()
        for piece in (b"one", b"two"):
            assert await client.until(chunk(piece)) == chunk(piece)
            at.upstream.go_on.release()
        assert await client.rest() == b""
        await eventually(lambda: at.ends == ["UpstreamError"])


@pytest.mark.parametrize(
    ("stream", "begun"),
    [
        (False, head(CHUNKED)),
        (True, head(b"content-length: 6")),
        (True, head(CHUNKED, status=b"400 Bad Request")),
    ],
    ids=["not asked for", "of a known length", "an error"],
)
async def test_what_is_no_stream_is_held(relay: Relay, stream: bool, begun: bytes) -> None:
    """So its failure can still be answered."""
    pieces = [chunk(b"one"), chunk(b"two")] if CHUNKED in begun else [b"one"]
    async with relayed(relay, [begun, *pieces, End.RESET], stream=stream) as at, Client(at.port) as client:
        await client.get()
        assert await client.status() == 502


async def test_what_fails_before_the_beginning_can_still_be_answered(relay: Relay) -> None:
    answer: Answer = [EVENTS, chunk(b"data: no end"), End.RESET]
    async with relayed(relay, answer) as at, Client(at.port) as client:
        await client.get()
        assert await client.status() == 502


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), min_size=1, max_size=8),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_events_come_through_whole_however_they_are_cut(payloads: list[bytes], cuts: list[int]) -> None:
    """Every chunk that the client gets ends with an event's end."""
    whole = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    pieces = [whole[a:b] for a, b in pairwise(sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))}))]

    async def run() -> None:
        async with relayed(OWN, [EVENTS, *map(chunk, pieces), b"0\r\n\r\n"]) as at, Client(at.port) as client:
            await client.get()
            await client.head()
            received = b""
            while (size := int(await client.reader.readline(), 16)) > 0:
                received += await client.reader.readexactly(size)
                assert received.endswith(b"\n\n")
                await client.reader.readline()
            assert received == whole

    asyncio.run(run())
