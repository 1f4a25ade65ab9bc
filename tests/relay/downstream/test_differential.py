"""The server that serves against aiohttp's own, on requests framed at random: the same answers to both' clients."""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import httptools
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.relay.downstream import server
from hpc_router.relay.downstream.interface import Request, Response
from tests.relay.reference import server as server_aiohttp
from tests.relay.serving import Client, served
from tests.support.relays import Listen
from tests.support.waiting import GUARD_S

ECHOED = ("x-a", "content-type", "authorization")


async def echo(request: Request) -> Response | None:
    """What it was asked, in the way that the path's beginning says."""
    body = await request.read()
    said = {name: request.headers.text(name) for name in ECHOED}
    text = json.dumps([request.method, request.path, request.query, said, body.hex()]).encode()
    head = b"x-length: %d\r\n" % len(body)
    match request.path[:2]:
        case "/s":
            request.start_response(200, head, length=None)
            for at in range(0, len(text), 50):
                if not request.write(text[at : at + 50]):
                    await request.drain()
        case "/f":
            request.start_response(201, head, length=len(text))
            request.write(text)
        case "/e":
            request.start_response(200, head, length=None)
        case "/n":
            return Response(204, head)
        case "/c":
            request.keep_alive = False
            return Response(200, head, text)
        case _:
            return Response(200, head, text)
    return None


@dataclass(frozen=True)
class Sent:
    method: str
    data: bytes
    expects: bool
    closes: bool  # by its own words, or by the handler's


@dataclass
class Case:
    """`pieces`: how they go out, all at once or request by request."""

    requests: list[Sent]
    pieces: list[bytes]


VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126) | st.sampled_from(" \té"), max_size=9).map(
    str.strip
)
PATHS = st.sampled_from(["/", "/s", "/f", "/e", "/n", "/c", "/s/%C3%A4%20b", "/x%2Fy", "/f/a;b=c", "/s//"])
QUERIES = st.sampled_from(["", "", "?a=b", "?a=%20b&c", "?", "?a=%C3%A4"])


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    version = draw(st.sampled_from(["1.1", "1.1", "1.1", "1.0"]))
    method = draw(st.sampled_from(["GET", "POST", "POST", "PUT", "HEAD", "DELETE", "OPTIONS"]))
    target = draw(st.sampled_from(["", "", "", "http://other:81"])) + draw(PATHS) + draw(QUERIES)
    fields = [f"{draw(st.sampled_from(['Host', 'host']))}: x"]
    fields += [
        f"{name}: {draw(VALUES)}" for name in draw(st.lists(st.sampled_from(["X-A", "x-b"]), max_size=2, unique=True))
    ]
    fields += draw(
        st.lists(
            st.sampled_from(["Content-Type: text/x", "Authorization: Bearer t", "Accept: */*"]), max_size=2, unique=True
        )
    )
    connection = draw(st.sampled_from([None, None, None, "close", "keep-alive", "Keep-Alive"]))
    if connection is not None:
        fields.append(f"Connection: {connection}")
    elif version == "1.1" and not draw(st.integers(0, 4)):
        fields += ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"]
    body, pieces = b"", draw(st.lists(st.binary(min_size=1, max_size=60), max_size=3))
    framing = draw(st.sampled_from(["none", "length", "chunks"] if version == "1.1" else ["none", "length"]))
    expects = framing != "none" and version == "1.1" and draw(st.integers(0, 3)) == 0
    if framing == "length":
        body = b"".join(pieces)
        name = draw(st.sampled_from(["Content-Length: ", "content-length: ", "Content-Length:", "CONTENT-LENGTH:  "]))
        fields.insert(draw(st.integers(0, len(fields))), f"{name}{len(body)}")
    elif framing == "chunks":
        extensions = st.sampled_from([b"", b"", b";a", b";a=b", b';a="b c"'])
        width = draw(st.sampled_from([b"%x", b"%X", b"%04x"]))
        body = b"".join(width % len(p) + draw(extensions) + b"\r\n" + p + b"\r\n" for p in pieces) + b"0\r\n"
        body += draw(st.sampled_from([b"", b"", b"x-t: trailer\r\n", b"a: b\r\nc: d\r\n"])) + b"\r\n"
        fields.insert(draw(st.integers(0, len(fields))), "Transfer-Encoding: chunked")
    if expects:
        fields.append("Expect: 100-continue")
    head = "\r\n".join([f"{method} {target} HTTP/{version}", *fields, "", ""])
    kept = connection != "close" and (version == "1.1" or connection is not None)
    closes = not kept or "/c" in target or (version == "1.0" and ("/s" in target or "/e" in target))
    return Sent(method, head.encode() + body, expects, closes)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Some requests come twice or more, so that their heads are known. None comes after one that closes."""
    kinds = draw(st.lists(requests(), min_size=1, max_size=3))
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6))
    chosen = chosen[: next((i + 1 for i, sent in enumerate(chosen) if sent.closes), len(chosen))]
    stream = b"".join(sent.data for sent in chosen)
    if draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, len(stream)), max_size=6))
        pieces = [stream[a:b] for a, b in pairwise(sorted({0, len(stream), *cuts}))]
    else:
        pieces = [sent.data for sent in chosen]
    return Case(chosen, pieces)


class Reader:
    """Strict: one answer for one request, and nothing besides. `seen`: status, own header and body of each."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bytes, bytes]] = []
        self.complete = False

    def on_message_begin(self) -> None:
        assert not self.complete, "something follows the answer"
        self._length, self._body = b"", bytearray()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-length":
            self._length = value

    def on_body(self, piece: bytes) -> None:
        self._body += piece

    def on_message_complete(self) -> None:
        self.complete = True


Seen = list[tuple[int, bytes, bytes] | str]


async def answers(client: Client, case: Case, *, at_once: bool) -> Seen:
    seen: Seen = []
    if at_once:
        await client.send(*case.pieces)
    for sent in case.requests:
        if not at_once:
            await client.send(sent.data)
        head = await one(client, sent.method)
        while head is not None and head[0] == 100:
            head = await one(client, sent.method)
        if head is None:
            return [*seen, "closed"]
        status, fields, body = head
        seen.append((status, fields, body))
    return [*seen, "kept" if await is_kept(client) else "closed"]


async def one(client: Client, method: str) -> tuple[int, bytes, bytes] | None:
    """None: the connection ended instead."""
    reader = client.reader
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as ended:
        assert not ended.partial  # noqa: PT017
        return None
    except ConnectionError:
        return None
    made = Reader()
    parser = httptools.HttpResponseParser(made)
    parser.feed_data(head)
    status = parser.get_status_code()
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    body = b""
    if status >= 200 and status != 204 and method != "HEAD":
        if fields.get(b"transfer-encoding") == b"chunked":
            assert b"content-length" not in fields
            while (size := int(await reader.readuntil(b"\r\n"), 16)) > 0:
                body += await reader.readexactly(size)
                assert await reader.readexactly(2) == b"\r\n"
            assert await reader.readexactly(2) == b"\r\n"
        elif b"content-length" in fields:
            body = await reader.readexactly(int(fields[b"content-length"]))
        else:
            assert fields.get(b"connection") == b"close" or head.startswith(b"HTTP/1.0")
            body = await reader.read()
    return status, fields.get(b"x-length", b""), body


async def is_kept(client: Client) -> bool:
    """One more request is answered, or the connection has ended."""
    with suppress(ConnectionError):
        await client.send(b"GET /last HTTP/1.1\r\nHost: x\r\n\r\n")
        return await one(client, "GET") is not None
    return False


async def ask(listen: Listen, case: Case, *, at_once: bool) -> Seen:
    async with served(listen, echo) as port, Client(port) as client, asyncio.timeout(GUARD_S):
        return await answers(client, case, at_once=at_once)


async def compare(case: Case) -> None:
    # The reference loses what follows an offer of another protocol in the same piece.
    at_once = not any(sent.expects or b"Upgrade" in sent.data for sent in case.requests)
    expected = await ask(server_aiohttp.listening, case, at_once=at_once)
    assert await ask(server.listening, case, at_once=at_once) == expected


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_framed_at_random_they_get_the_same_answers(new_loop: type[asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:

        @settings(max_examples=150, deadline=None)
        @given(cases())
        def check(case: Case) -> None:
            runner.run(compare(case))

        check()
