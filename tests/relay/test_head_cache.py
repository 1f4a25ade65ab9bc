"""What is answered from the table of known heads is what the parser would have made of the same bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.errors import RoutingError, UpstreamError
from hpc_router.relay.downstream import request_parser
from hpc_router.relay.downstream.request_parser import RefusedError, RequestParser
from hpc_router.relay.head_cache import MAX_HEAD_BYTES, MAX_HEADS, HeadCache
from hpc_router.relay.upstream import response_parser
from hpc_router.relay.upstream.response_parser import ResponseParser
from tests.relay.downstream.support import ODD, REFUSED
from tests.relay.malformed import MALFORMED

MAX_BODY = 2**16
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(autouse=True)
def empty_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_parser, "_HEADS", HeadCache(request_parser._cacheable_head, ids=True))
    monkeypatch.setattr(response_parser, "_HEADS", HeadCache(response_parser._cacheable_head))
    monkeypatch.setattr(response_parser, "_CHUNKED_HEADS", HeadCache(response_parser._cacheable_chunked_head))


@dataclass
class Seen:
    """Of one request; `fields` without the length, which heads from the table lack."""

    line: tuple[str, str, str, str]
    fields: list[tuple[bytes, bytes]]
    request_id: bytes
    keep_alive: bool
    expects: bool
    body: bytes
    complete: bool
    failure: type[RoutingError] | None


def requests(*pieces: bytes, parse: bool = False) -> list[Seen | int]:
    """As a server would take them, each as soon as it is there; at the end the refusal's status, if there was one."""
    parser, taken, refused = RequestParser(max_body=MAX_BODY, request_type=request_parser.ParsedRequest), [], 0
    for piece in pieces:
        try:
            (parser.parse if parse and not parser._ended else parser.feed)(piece)
        except RefusedError as error:
            refused = error.status
        while parser.waiting:
            taken.append(parser.waiting.popleft())
    seen: list[Seen | int] = []
    for message in taken:
        head = message.head
        fields = [field for field in head.headers.fields if field[0] != b"content-length"]
        line = head.method, head.target, head.path, head.query
        body = b"".join(message.chunks) if message.complete else b""
        failure = None if message.failure is None else type(message.failure)
        keep = message.keep_alive
        seen.append(Seen(line, fields, message.request_id, keep, head.expects, body, message.complete, failure))
        if not message.keep_alive:
            return seen  # what follows is nobody's
    return [*seen, refused] if refused else seen


Answered = tuple[int, list[tuple[bytes, bytes]], int | None, bytes, bool, bool, bool]


def response(*pieces: bytes, parse: bool = False) -> Answered:
    parser, failed = ResponseParser(), False
    try:
        for piece in pieces:
            (parser.parse if parse else parser.feed)(piece)
    except UpstreamError:
        failed = True
    fields = [field for field in parser.headers.fields if field[0] != b"content-length"]
    keep_alive = parser.complete and parser.keep_alive
    return parser.status, fields, parser.length, b"".join(parser.chunks), parser.complete, keep_alive, failed


NAMES = ["Content-Length", "content-length", "Content-length", "CONTENT-LENGTH", "Content-Length ", "X-Content-Length"]
SEPARATORS = [": ", ":", ":  ", ":\t", ": \t"]
LENGTHS = ["0", "3", "5", "05", "", "3 ", "+3", "3, 3", "3\r\n 3", "5\r\nContent-Length: 5", "5\r\nContent-Length: "]
OTHERS = [
    "A: b", "Authorization: Bearer t", "X: Content-Length: 3", "X: \tContent-Length: 3", "Connection: close",
    "Connection: keep-alive", "Transfer-Encoding: chunked", "Expect: 100-continue", "Connection: upgrade",
    "Upgrade: h2c", "Host: y", "A: b\r\n c", "Content-Length: ", "Content-Length: \0",
    "x-request-id: 1a", "x-request-id: 2-b", "X-Request-Id: 3", "x-request-id: 4 ", "x-request-id: ",
    "x-request-id: 5\r\n 6",
]  # fmt: skip
BODIES = [
    b"",
    b"abc",
    b"hello",
    b"\r\n\r\nx",
    b"a\r\n\r\n",
    b"\r\nContent-Length: 3\r\n\r\nabc",
    b"0\r\n\r\n",
    GET + b"\r\n",
]
REQUEST_LINES = ["GET / HTTP/1.1", "POST /a?b HTTP/1.1", "HEAD / HTTP/1.1", "POST / HTTP/1.0", "CONNECT x:1 HTTP/1.1"]
STATUS_LINES = [
    "HTTP/1.1 200 OK",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 204 x",
    "HTTP/1.1 304 x",
    "HTTP/1.1 100 x",
    "HTTP/1.1 101 x",
]


@st.composite
def messages(draw: st.DrawFn, first_lines: list[str]) -> bytes:
    """Well-formed ones, and others that look much like them."""
    fields = draw(st.lists(st.sampled_from(OTHERS), max_size=3))
    body = draw(st.sampled_from(BODIES))
    kind = draw(st.sampled_from(["right", "right", "any", "none"]))
    if kind != "none":
        name = draw(st.sampled_from(NAMES))
        said = str(len(body)) if kind == "right" else draw(st.sampled_from(LENGTHS))
        fields.insert(draw(st.integers(0, len(fields))), name + draw(st.sampled_from(SEPARATORS)) + said)
    if draw(st.integers(0, 9)):
        fields.insert(0, "Host: x")
    return "\r\n".join([draw(st.sampled_from(first_lines)), *fields, "", ""]).encode() + body


@st.composite
def connections(draw: st.DrawFn, first_lines: list[str]) -> list[list[bytes]]:
    """What comes over several connections: the same messages again and again, cut between head and body or anywhere."""
    known = draw(st.lists(messages(first_lines), min_size=1, max_size=3))
    made = []
    for _ in range(draw(st.integers(3, 6))):
        pieces: list[bytes] = []
        for message in draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)):
            cuts = draw(st.sampled_from(["none", "none", "body", "any"]))
            at = {"none": 0, "body": message.find(b"\r\n\r\n") + 4}.get(cuts)
            at = draw(st.integers(0, len(message))) if at is None else at
            if cuts == "any" and pieces and draw(st.booleans()):
                pieces[-1] += message[:at]
            else:
                pieces.append(message[:at])
            pieces.append(message[at:])
        made.append([piece for piece in pieces if piece])
    return made


@given(connections(REQUEST_LINES))
def test_requests_are_what_the_parser_makes_of_them(given: list[list[bytes]]) -> None:
    """Whatever the table has learned from other connections."""
    for pieces in given:
        assert requests(*pieces) == requests(*pieces, parse=True)


@given(connections(STATUS_LINES))
def test_responses_are_what_the_parser_makes_of_them(given: list[list[bytes]]) -> None:
    for pieces in given:
        assert response(*pieces) == response(*pieces, parse=True)


CHUNKED_HEADS = [
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\ntransfer-encoding: chunked\r\nConnection: close\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
    "HTTP/1.1 204 x\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/1.1 100 x\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n",
]
CHUNKS = [
    b"3\r\nabc\r\n", b"5\r\n\r\n0\r\n\r\n", b"7\r\nab\r\n0\r\n\r\n", b"a\r\n0123456789\r\n", b"A\r\n0123456789\r\n",
    b"03\r\nabc\r\n", b"3;x=1\r\nabc\r\n", b"4\r\nabc\r\n", b"zz\r\n", b"10\r\n0123456789abcdef\r\n",
]  # fmt: skip
ENDS = [b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"", b"00\r\n\r\n", b"0\r\n\r\n0\r\n\r\n"]


@given(st.data())
def test_chunked_responses_are_what_the_parser_makes_of_them(data: st.DataObject) -> None:
    """However they are cut, with heads that were seen before."""
    heads = data.draw(st.lists(st.sampled_from(CHUNKED_HEADS), min_size=1, max_size=2))
    for _ in range(data.draw(st.integers(3, 6))):
        start = data.draw(st.sampled_from(heads)).encode()
        pieces = [start, *data.draw(st.lists(st.sampled_from(CHUNKS), max_size=4)), data.draw(st.sampled_from(ENDS))]
        joined: list[bytes] = []
        for piece in pieces:
            kind = data.draw(st.sampled_from(["alone", "alone", "joined", "cut"]))
            at = data.draw(st.integers(0, len(piece))) if kind == "cut" else 0
            if kind != "alone" and joined:
                joined[-1] += piece[:at] if kind == "cut" else piece
                joined.append(piece[at:] if kind == "cut" else b"")
            else:
                joined += [piece[:at], piece[at:]]
        cut = [piece for piece in joined if piece]
        assert response(*cut) == response(*cut, parse=True)


def test_a_stream_with_a_cached_head_needs_no_http_parser() -> None:
    pieces = CHUNKED_HEADS[1].encode() + b"3\r\nabc\r\n", b"3\r\ndef\r\n", b"3\r\nghi\r\n0\r\n\r\n"
    for _ in range(2):
        response(*pieces)
    parser = ResponseParser()
    for piece in pieces:
        parser.feed(piece)
        assert parser._parser is None
    assert (parser.status, parser.complete, b"".join(parser.chunks)) == (200, True, b"abcdefghi")


HOSTILE = [data for data, _, _ in REFUSED.values()] + [data for data, _ in ODD.values()]


@given(st.data())
def test_requests_with_bytes_changed_are_what_the_parser_makes_of_them(data: st.DataObject) -> None:
    """Known heads beside others that differ from them in a few bytes."""
    of = st.sampled_from([d for d in HOSTILE if len(d) < 500])
    _changed(data, data.draw(of), lambda *pieces, parse: requests(*pieces, parse=parse))


@given(st.data())
def test_responses_with_bytes_changed_are_what_the_parser_makes_of_them(data: st.DataObject) -> None:
    whole = [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", *[d for d in MALFORMED.values() if len(d) < 500]]
    _changed(data, data.draw(st.sampled_from(whole)), lambda *pieces, parse: response(*pieces, parse=parse))


def _changed(data: st.DataObject, message: bytes, take: Callable[..., object]) -> None:
    variants = [bytearray(message) for _ in range(3)]
    for variant in variants[1:]:
        for _ in range(data.draw(st.integers(1, 2))):
            at = data.draw(st.integers(0, len(variant) - 1))
            put = st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"0", b"3", b"\0", b":", b" ", b"\t", b"x", b"C"])
            variant[at : at + data.draw(st.integers(0, 3))] = data.draw(put)
            variant = variant or bytearray(b"x")
    for _ in range(6):
        variant = data.draw(st.sampled_from(variants))
        end = variant.find(b"\r\n\r\n") + 4
        cut = data.draw(st.sampled_from([0, max(0, end), data.draw(st.integers(0, len(variant)))]))
        pieces = [bytes(piece) for piece in (variant[:cut], variant[cut:]) if piece]
        assert take(*pieces, parse=False) == take(*pieces, parse=True)


@given(
    st.lists(st.sampled_from([GET + b"\r\n", POST + b"Content-Length: 3\r\n\r\nabc"]), min_size=3, max_size=6),
    st.data(),
)
def test_requests_are_the_same_however_they_are_cut(whole: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(whole)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    pieces = [stream[a:b] for a, b in pairwise(sorted({0, len(stream), *cuts}))]
    assert requests(*pieces) == requests(*whole, parse=True)


# What was once accepted.


def test_an_empty_length_is_not_the_head_of_another_without_its_digits() -> None:
    for _ in range(3):
        assert requests(POST + b"Content-Length: 3\r\n\r\nabc") != [400]
    assert requests(POST + b"Content-Length: \r\n\r\n") == [400]


@pytest.mark.parametrize("line", [b"Content-Length:3", b"CONTENT-LENGTH: 3", b"Content-Length:  3"])
def test_a_length_in_other_words_is_a_length_all_the_same(line: bytes) -> None:
    """When the head comes without its body, as in a packet of its own."""
    for _ in range(4):
        (got,) = requests(POST + line + b"\r\n\r\n", b"GET")
        assert isinstance(got, Seen)
        assert (got.complete, got.body) == (True, b"GET")
        answer = response(b"HTTP/1.1 200 OK\r\n" + line + b"\r\n\r\n", b"abc")
        assert answer[2:5] == (3, b"abc", True)


def test_the_rest_of_a_head_is_no_request() -> None:
    """Where the beginning came behind another request: whoever is in front of us sees one header, not a request."""
    whole = GET + b"\r\n"
    for _ in range(3):
        requests(whole)
    first, second = requests(whole + b"POST / HTTP/1.1\r\nX: ", whole)
    assert isinstance(first, Seen)
    assert isinstance(second, Seen)
    assert (b"x", b"GET / HTTP/1.1") in second.fields


@pytest.mark.parametrize("line", [b"X-Request-Id: 3", b"X-REQUEST-ID: 3", b"x-request-id:3"])
def test_an_id_in_any_spelling_is_kept_however_often_its_head_comes(line: bytes) -> None:
    for _ in range(4):
        (got,) = requests(GET + line + b"\r\n\r\n")
        assert isinstance(got, Seen)
        assert got.request_id == b"3"


# What heads share, and how many there are.


def test_heads_that_differ_in_a_credential_share_nothing() -> None:
    def ask(token: bytes, body: bytes) -> request_parser.RequestHead:
        parser = RequestParser(max_body=MAX_BODY, request_type=request_parser.ParsedRequest)
        parser.feed(POST + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (token, len(body), body))
        return parser.waiting[0].head

    for _ in range(3):
        known = ask(b"owner", b"abc")
    known.headers.cached["checked"] = True
    assert ask(b"owner", b"something else").headers is known.headers
    for _ in range(3):
        other = ask(b"0wner", b"abc")
        assert other.headers is not known.headers
        assert not other.headers.cached


def test_heads_that_differ_in_the_request_s_id_are_one() -> None:
    def ask(request_id: bytes) -> request_parser.ParsedRequest:
        parser = RequestParser(max_body=MAX_BODY, request_type=request_parser.ParsedRequest)
        parser.feed(POST + b"x-request-id: %b\r\nContent-Length: 3\r\n\r\nabc" % request_id)
        return parser.waiting[0]

    ask(b"1")
    first, second = ask(b"22"), ask(b"333-4")
    assert first.head is second.head
    assert (first.request_id, second.request_id) == (b"22", b"333-4")
    assert b"x-request-id" not in second.head.headers


def test_the_table_is_bounded() -> None:
    """In heads and in bytes: long heads are not looked for."""
    parsed: list[bytes] = []
    heads: HeadCache[int] = HeadCache(lambda data: parsed.append(data) or 1)  # type: ignore[func-returns-value]
    for i in range(3 * MAX_HEADS):
        for _ in range(3):
            heads.lookup(b"GET /%d HTTP/1.1\r\n\r\n" % i)
        heads.lookup(b"GET /once/%d HTTP/1.1\r\n\r\n" % i)
    assert len(parsed) == 3 * MAX_HEADS
    assert len(heads._heads) <= MAX_HEADS
    assert len(heads._seen_once) <= MAX_HEADS
    long = b"GET / HTTP/1.1\r\nA: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n"
    assert [heads.lookup(long) for _ in range(3)] == [None] * 3
    assert len(parsed) == 3 * MAX_HEADS


def test_a_body_may_be_far_longer_than_a_head() -> None:
    heads: HeadCache[int] = HeadCache(len)
    data = POST + b"Content-Length: %d\r\n\r\n" % 2**20 + b"x" * 2**20
    assert [heads.lookup(data) for _ in range(2)] == [None, (len(data), b"x" * 2**20, b"")]


@pytest.mark.parametrize("data", [b"\0", b"\0005\r\nabcde", b"\0garbage\r\n\r\n", b"", b"5\r\nabcde"])
def test_an_empty_table_knows_no_bytes_at_all(data: bytes) -> None:
    """What a process receives first may be anything, from a client without a token or from a broken engine."""
    heads: HeadCache[str] = HeadCache(lambda _: None)
    assert heads.lookup(data) is None
    assert heads.lookup_start(data) is None
