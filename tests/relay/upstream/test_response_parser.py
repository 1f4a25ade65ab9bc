"""Bytes of one response in, head and body out: the same however they are cut, and an error where they are wrong."""

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.errors import UpstreamError
from hpc_router.relay.upstream.response_parser import MAX_HEAD_BYTES, ResponseParser
from tests.relay.malformed import ENDLESS, MALFORMED, TRUNCATED
from tests.relay.scripted import CHUNKED, chunked, head, sized


@dataclass
class Outcome:
    status: int
    headers: list[tuple[bytes, bytes]]
    length: int | None
    body: bytes
    complete: bool
    keep_alive: bool
    failed: bool


def frame(*pieces: bytes, head_only: bool = False, eof: bool = False) -> Outcome:
    parser, body, failed = ResponseParser(head_only=head_only), b"", False
    try:
        for piece in pieces:
            parser.feed(piece)
            body += b"".join(parser.chunks)
            parser.chunks.clear()
        if eof:
            parser.feed_eof()
    except UpstreamError:
        failed = True
        body += b"".join(parser.chunks)
    keep_alive = parser.keep_alive and parser.complete
    fields = [field for field in parser.headers.fields if field[0] != b"content-length"]  # it may be missing
    return Outcome(parser.status, fields, parser.length, body, parser.complete, keep_alive, failed)


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


WELL_FORMED = {
    "length": (sized(b"abc"), b"abc", True),
    "no body": (sized(b""), b"", True),
    "chunks": (head(CHUNKED) + chunked(b"a", b"bc"), b"abc", True),
    "an empty chunked body": (head(CHUNKED) + chunked(), b"", True),
    "extensions and trailers": (head(CHUNKED) + chunked(b"abc", trailers=b"x: y\r\n", extension=b";a=b"), b"abc", True),
    "an empty header": (sized(b"abc", b"x-empty:"), b"abc", True),
    "after interim ones": (head(status=b"100 x") + head(b"a: b", status=b"103 x") + sized(b"abc"), b"abc", True),
    "204": (head(status=b"204 No Content"), b"", True),
    "304 with a length": (head(b"content-length: 5", status=b"304 Not Modified"), b"", True),
    "connection: close": (sized(b"abc", b"connection: close"), b"abc", False),
    "HTTP/1.0": (head(b"content-length: 3", version=b"1.0") + b"abc", b"abc", False),
    "kept HTTP/1.0": (head(b"content-length: 3", b"connection: keep-alive", version=b"1.0") + b"abc", b"abc", True),
}  # fmt: skip


@pytest.mark.parametrize(("data", "body", "keep_alive"), WELL_FORMED.values(), ids=WELL_FORMED)
def test_well_formed_answers(data: bytes, body: bytes, keep_alive: bool) -> None:
    """Whole at once and byte by byte; complete without waiting for the connection's end."""
    outcome = frame(data)
    assert (outcome.body, outcome.complete, outcome.keep_alive, outcome.failed) == (body, True, keep_alive, False)
    assert frame(*bytewise(data)) == outcome


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_answers_are_refused_at_once(data: bytes) -> None:
    assert frame(data).failed


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_answers_are_refused_byte_by_byte(data: bytes) -> None:
    assert frame(*bytewise(data)).failed


@pytest.mark.parametrize(("beginning", "more"), ENDLESS.values(), ids=ENDLESS)
def test_what_has_no_end_is_refused(beginning: bytes, more: bytes) -> None:
    """Within the limit and one read more, so that nothing grows."""
    parser, read = ResponseParser(), more * (2**13 // len(more))
    parser.feed(beginning)
    reads = [read] * (MAX_HEAD_BYTES // len(read) + 2)
    with pytest.raises(UpstreamError):
        deque(map(parser.feed, reads))


@pytest.mark.parametrize("data", TRUNCATED.values(), ids=TRUNCATED)
def test_truncated_answers_are_noticed_at_the_connections_end(data: bytes) -> None:
    outcome = frame(data)
    assert not outcome.complete
    assert not outcome.failed
    assert frame(data, eof=True).failed


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_without_a_length_the_connections_end_is_the_bodys(version: bytes) -> None:
    data = head(version=version) + b"abc"
    assert not frame(data).complete
    outcome = frame(data, eof=True)
    assert (outcome.body, outcome.complete, outcome.keep_alive) == (b"abc", True, False)


@pytest.mark.parametrize("fields", [(b"content-length: 3",), (CHUNKED,), ()])
def test_the_answer_to_head_has_no_body(fields: tuple[bytes, ...]) -> None:
    outcome = frame(head(*fields), head_only=True)
    assert (outcome.complete, outcome.body) == (True, b"")
    with_body = frame(head(*fields) + b"abc", head_only=True)
    assert (with_body.complete, with_body.body, with_body.keep_alive) == (True, b"", False)


@pytest.mark.parametrize("more", [b"x", b"HTTP/1.1 200 OK\r\n", sized(b"abc"), head(b"a: b", status=b"204 No")])
@pytest.mark.parametrize("data", [sized(b"abc"), head(CHUNKED) + chunked(b"abc"), head(status=b"204 No")])
def test_what_follows_the_end_spoils_the_connection_and_not_the_answer(data: bytes, more: bytes) -> None:
    whole, spoilt = frame(data), frame(data + more)
    assert (spoilt.status, spoilt.headers, spoilt.length) == (whole.status, whole.headers, whole.length)
    assert spoilt.body == whole.body
    assert (spoilt.complete, spoilt.keep_alive, spoilt.failed) == (True, False, False)


def test_headers_up_to_the_limit_pass() -> None:
    framing = len("content-length0aabc") + 1
    value = b"x" * (MAX_HEAD_BYTES - framing)
    outcome = frame(sized(b"abc", b"a: " + value))
    assert (outcome.failed, outcome.body) == (False, b"abc")


def test_a_large_first_read_is_no_large_head() -> None:
    outcome = frame(sized(b"x" * 2**20))
    assert (outcome.failed, len(outcome.body)) == (False, 2**20)


ANSWERS = [data for data, _, _ in WELL_FORMED.values()] + [d for d in MALFORMED.values() if len(d) < 500]


@given(st.data())
def test_cuts_make_no_difference(data: st.DataObject) -> None:
    """Also for answers with bytes changed, dropped and put in: what comes of them does not depend on the network."""
    answer = bytearray(data.draw(st.sampled_from(ANSWERS)))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(answer) - 1))
        width = data.draw(st.integers(0, 3))
        answer[at : at + width] = data.draw(
            st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"0", b"9", b"\0", b":", b" ", b"x"])
        )
        answer = answer or bytearray(b"x")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [bytes(answer[a:b]) for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    eof = data.draw(st.booleans())
    assert frame(*[p for p in pieces if p], eof=eof) == frame(bytes(answer), eof=eof)
