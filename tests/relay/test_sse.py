"""Whole events only, however the bytes are cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.relay import sse


@st.composite
def stream_and_cuts(draw: st.DrawFn) -> tuple[list[bytes], bytes, list[int]]:
    end = draw(st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"]))
    payload = st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b""))
    events = [b"data: " + body + end for body in draw(st.lists(payload, max_size=8))]
    tail = draw(st.sampled_from([b"", b"data: unfin", b"data: x\n"])) if end == b"\n\n" else b""
    whole = b"".join(events) + tail
    return events, tail, sorted(draw(st.lists(st.integers(0, len(whole)), max_size=10)))


@given(stream_and_cuts())
def test_events_come_out_whole_for_every_cut(case: tuple[list[bytes], bytes, list[int]]) -> None:
    """What was fed so far comes out up to the end of its last event; nothing is lost, added or reordered."""
    events, tail, cuts = case
    whole = b"".join(events) + tail
    ends = {sum(map(len, events[:i])) for i in range(len(events) + 1)}
    splitter, out = sse.EventSplitter(), b""
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        out += splitter.feed(whole[start:stop])
        assert len(out) in ends
    assert out == b"".join(events)
    assert splitter.tail == tail


def test_an_endless_event_is_refused() -> None:
    splitter = sse.EventSplitter()
    splitter.feed(b"x" * sse.MAX_EVENT_BYTES)
    with pytest.raises(sse.EventTooLargeError):
        splitter.feed(b"x")


def test_the_error_event_is_one_event_with_an_error_key() -> None:
    event = sse.error_event({"message": "gone"})
    assert sse.EventSplitter().feed(event) == event
    assert json.loads(event.removeprefix(b"data: ")) == {"error": {"message": "gone"}}
