"""Whole events only, however the bytes are cut."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.relay import sse

LINE_END = st.sampled_from([b"\n", b"\r\n", b"\r"])
PAYLOAD = st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b""))
BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
ENDS_WITH_BLANK_LINE = re.compile(BLANK_LINE.pattern + rb"\Z")


@st.composite
def stream_and_cuts(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """Events whose lines and blank lines end as the standard allows, mixed, and perhaps a tail."""
    events = [b"data: " + body + draw(LINE_END) + draw(LINE_END) for body in draw(st.lists(PAYLOAD, max_size=8))]
    whole = b"".join(events) + draw(st.sampled_from([b"", b"data: unfin", b"data: x\n"]))
    return whole, sorted(draw(st.lists(st.integers(0, len(whole)), max_size=10)))


@given(stream_and_cuts())
def test_events_come_out_whole_for_every_cut(case: tuple[bytes, list[int]]) -> None:
    """What was fed so far comes out up to the end of its last event; nothing is lost, added or reordered."""
    whole, cuts = case
    splitter, out, fed = sse.EventSplitter(), b"", 0
    for stop in [*cuts, len(whole)]:
        out += splitter.feed(whole[fed:stop])
        fed = stop
        assert whole[:fed] == out + splitter.tail
        assert not BLANK_LINE.search(splitter.tail), "no event that has ended is kept"
        assert not out or ENDS_WITH_BLANK_LINE.search(out), "no event comes out before it has ended"


@pytest.mark.parametrize("ends", [b"\n\n", b"\n\r\n", b"\n\r", b"\r\n\n", b"\r\n\r\n", b"\r\n\r", b"\r\r\n", b"\r\r"])
def test_every_blank_line_of_the_standard_ends_an_event(ends: bytes) -> None:
    event = b"data: a" + ends
    for cut in range(len(event)):
        splitter = sse.EventSplitter()
        out = splitter.feed(event[:cut]) + splitter.feed(event[cut:] + b"data: b")
        late = (
            b"\n" if event[cut - 1 :] == b"\r\n" else b""
        )  # the CR ended the event, so its LF comes with the next one
        assert (out + late, splitter.tail) == (event, late + b"data: b")


TAILS = {
    "[DONE] and LF": (b"data: [DONE]\n", b"\n"),
    "[DONE] and CRLF": (b"data: [DONE]\r\n", b"\r\n"),
    "[DONE] and CR": (b"data: [DONE]\r", b"\r"),
    "[DONE] alone": (b"data: [DONE]", b"\n\n"),
    "[DONE] without a space": (b"data:[DONE]\n", b"\n"),
    "[DONE] and blanks": (b"data: [DONE] \t\n", b"\n"),
    "[DONE], blanks and no line end": (b"data:  [DONE] ", b"\n\n"),
    "[DONE] after a byte order mark": (b"\xef\xbb\xbfdata: [DONE]\n", b"\n"),
    "[DONE] between other fields": (b"event: end\ndata: [DONE]\nid: 7\n", b"\n"),
    "the pause before a reconnection": (b"retry: 100\n", b"\n"),
    "a chunk": (b'data: {"choices": []}\n', b"\n"),
    "a chunk alone": (b'data: {"choices": []}', b"\n\n"),
    "a named event": (b'event: message_stop\r\ndata: {"type": "message_stop"}\r\n', b"\r\n"),
    "data of two lines": (b'data: {"a":\ndata: 1}\n', b"\n"),
    "a comment": (b": ping\n", b"\n"),
    "a comment alone": (b": pi", b"\n\n"),
    "an end of line": (b"\n", b""),
    "nothing": (b"", b""),
}


@pytest.mark.parametrize(("tail", "added"), TAILS.values(), ids=TAILS)
def test_a_whole_tail_is_closed_at_a_clean_end(tail: bytes, added: bytes) -> None:
    splitter = sse.EventSplitter()
    assert splitter.feed(b"data: a\n\n") == b"data: a\n\n"
    assert splitter.feed(tail) == b""
    assert splitter.end() == tail + added
    assert splitter.end() == b""


@pytest.mark.parametrize(
    "tail",
    [
        b"data: [DON",
        b"data: ",
        b"dat",
        b'data: {"choices": [',
        b'data: {"choices": [{"delta": {"content": "ab\n',
        b'data: {"a": 1}\ndata: {"b',
        b"event: message_stop\n",
        b"retry: 100\nid: 7\n",
        b"retr",
        b"event: message_stop\ndata: {",
        b"data: \xff\n",
        b"data: " + b"[" * 100_000,
    ],
)
def test_a_cut_tail_is_an_error(tail: bytes) -> None:
    splitter = sse.EventSplitter()
    splitter.feed(tail)
    with pytest.raises(sse.UnfinishedEventError):
        splitter.end()


@given(st.lists(st.lists(PAYLOAD, min_size=1, max_size=3), max_size=5), LINE_END)
def test_payloads_are_the_data_of_each_event(events: list[list[bytes]], end: bytes) -> None:
    written = b"".join(
        b": comment" + end + b"".join(b"data: " + line + end for line in lines) + b"event: x" + end + end
        for lines in events
    )
    assert list(sse.payloads(written)) == [b"\n".join(lines) for lines in events]
    assert list(sse.payloads(written + b"data: no end")) == [b"\n".join(lines) for lines in events]


def test_an_endless_event_is_refused() -> None:
    splitter = sse.EventSplitter()
    splitter.feed(b"x" * sse.MAX_EVENT_BYTES)
    with pytest.raises(sse.EventTooLargeError):
        splitter.feed(b"x")


def test_the_error_event_is_one_event_with_an_error_key() -> None:
    event = sse.error_event({"message": "gone"})
    assert sse.EventSplitter().feed(event) == event
    assert json.loads(event.removeprefix(b"data: ")) == {"error": {"message": "gone"}}
