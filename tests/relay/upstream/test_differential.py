"""The client that serves against aiohttp's own, on answers framed at random: the same status, headers and body."""

import asyncio
from dataclasses import dataclass

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.errors import UpstreamError
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.relay.upstream.interface import Upstream, UpstreamTimeouts
from tests.relay.reference.upstream import AiohttpClient
from tests.relay.scripted import Answer, End, head, scripted
from tests.support.waiting import GUARD_S

PATIENT = UpstreamTimeouts(connect_s=GUARD_S, first_byte_s=GUARD_S, idle_s=GUARD_S)
TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789-_!#$%&'*+.^`|~", min_size=1, max_size=12)
VALUE = st.text(st.characters(min_codepoint=33, max_codepoint=126) | st.sampled_from(" \té"), max_size=20).map(
    str.strip
)
RESERVED = {"content-length", "transfer-encoding", "connection", "content-encoding", "upgrade", "keep-alive", "trailer"}
FIELDS = st.lists(st.tuples(TOKEN.filter(lambda name: name.lower() not in RESERVED), VALUE), max_size=5)
STATUS = st.sampled_from([200, 201, 202, 204, 206, 304, 400, 404, 429, 500, 503]) | st.integers(200, 599)
EXTENSION = st.sampled_from([b"", b";a", b";a=b", b';a="b c"'])


@dataclass
class Case:
    method: str
    pieces: list[bytes]
    truncated: bool


def line(name: str, value: str) -> bytes:
    return f"{name}: {value}".encode()


@st.composite
def answers(draw: st.DrawFn) -> Case:
    """A well-formed answer, cut anywhere, or one that ends too early."""
    method = draw(st.sampled_from(["GET", "GET", "POST", "HEAD"]))
    status, fields = draw(STATUS), [line(*field) for field in draw(FIELDS)]
    version = draw(st.sampled_from([b"1.1", b"1.1", b"1.1", b"1.0"]))
    bodies = (
        []
        if method == "HEAD" or status in (204, 304)
        else draw(st.lists(st.binary(min_size=1, max_size=99), max_size=5))
    )
    framing = draw(st.sampled_from(["length", "chunked", "close"] if version == b"1.1" else ["length", "close"]))
    data = b"".join(bodies)
    if framing == "length":
        fields.insert(draw(st.integers(0, len(fields))), b"Content-Length: %d" % len(data))
        if draw(st.booleans()):
            fields.append(b"Connection: " + draw(st.sampled_from([b"close", b"keep-alive"])))
    elif framing == "chunked" and status not in (204, 304) and method != "HEAD":
        fields.insert(draw(st.integers(0, len(fields))), b"Transfer-Encoding: chunked")
        width = draw(st.sampled_from([b"%x", b"%X", b"%04x"]))
        data = b"".join(width % len(b) + draw(EXTENSION) + b"\r\n" + b + b"\r\n" for b in bodies) + b"0\r\n"
        data += b"".join(line(*field) + b"\r\n" for field in draw(FIELDS)) + b"\r\n"
    interim = head(b"link: x", status=b"103 Early Hints") * draw(st.integers(0, 2)) if version == b"1.1" else b""
    whole = interim + head(*fields, status=b"%d Reason" % status, version=version) + data
    has_end = framing != "close" or status in (204, 304) or method == "HEAD"
    truncated = has_end and draw(st.booleans())
    if truncated:
        whole = whole[: draw(st.integers(0, len(whole) - 1))]
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    return Case(method, [piece for piece in pieces if piece], truncated)


Seen = tuple[int, list[tuple[bytes, bytes]], int | None, bytes]


async def ask(client: Upstream, case: Case, *, by_sink: bool) -> Seen | None:
    """None: the answer was refused."""

    class Sink:
        def __init__(self) -> None:
            self.body = b""

        def write(self, data: bytes) -> bool:
            self.body += data
            return len(self.body) % 3 != 0

        def chunk_writer(self) -> None:
            return None

        async def drain(self) -> None:
            await asyncio.sleep(0)

    answer: Answer = [*case.pieces, End.CLOSE]
    sink, body = Sink(), b"x" if case.method == "POST" else None
    async with scripted(answer) as server:
        try:
            async with client.request(case.method, server.address, "/", body=body) as got:
                if by_sink:
                    await got.stream_to(sink)
                else:
                    sink.body = await got.read(2**20)
                fields = [field for field in got.headers.fields if field[0] != b"content-length"]  # it may be missing
                return got.status, fields, got.length, sink.body
        except UpstreamError:
            return None


async def compare(case: Case) -> None:
    async with UpstreamClient(PATIENT) as ours, AiohttpClient(PATIENT) as reference:
        expected = await ask(reference, case, by_sink=False)
        assert (expected is None) == case.truncated
        assert await ask(ours, case, by_sink=False) == expected
        assert await ask(ours, case, by_sink=True) == expected


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_framed_at_random_it_is_the_same_to_both_clients(new_loop: type[asyncio.AbstractEventLoop]) -> None:
    """And what ends too early is refused by both."""
    with asyncio.Runner(loop_factory=new_loop) as runner:

        @settings(max_examples=150, deadline=None)
        @given(answers())
        def check(case: Case) -> None:
            runner.run(compare(case))

        check()
