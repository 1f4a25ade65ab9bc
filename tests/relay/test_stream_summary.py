"""How many tokens a response has, by its `usage` or by its events."""

import json
from typing import Any

import pytest

from hpc_router.relay.api_formats import api_format_of
from hpc_router.relay.stream_summary import StreamSummary, TokenUsage, stated_usage, stated_usages

MARK = api_format_of("/v1/chat/completions").delta_mark
TEXT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}\n\n'
CHAT = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" , ", " : ")])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"id": "c", "usage": CHAT}, (5, 2, None)),
        ({"usage": CHAT, "id": "c"}, (5, 2, None)),
        ({"id": "c", "usage": CHAT | {"prompt_tokens_details": {"cached_tokens": 4}}, "x": None}, (5, 2, 4)),
        ({"id": "c", "usage": CHAT | {"prompt_tokens_details": None}}, (5, 2, None)),
        ({"id": "c", "usage": {"prompt_tokens": 9, "total_tokens": 9}}, (9, 0, None)),
        ({"id": "m", "usage": {"input_tokens": 6, "output_tokens": 1, "cache_read_input_tokens": 2}}, (6, 1, 2)),
        (
            {
                "response": {
                    "usage": {"input_tokens": 6, "output_tokens": 1, "input_tokens_details": {"cached_tokens": 0}}
                }
            },
            (6, 1, 0),
        ),
        ({"id": "c", "usage": {"prompt_tokens": "5", "completion_tokens": True}}, (None, None, None)),
        ({"id": "c", "usage": {"prompt_tokens": -5, "completion_tokens": 2}}, (None, 2, None)),
        ({"id": "c", "usage": {"completion_tokens": 2, "prompt_tokens_details": [1]}}, (None, 2, None)),
        ({"id": "c", "usage": None}, None),
        ({"id": "c", "usage": [1]}, None),
        ({"content": [{"input": {"usage": CHAT}}]}, None),
        ({"content": [{"input": {"usage": CHAT}}], "usage": {"input_tokens": 1, "output_tokens": 8}}, (1, 8, None)),
        ({"usage": {"input_tokens": 1, "output_tokens": 8}, "content": [{"input": {"usage": CHAT}}]}, (1, 8, None)),
        ({"text": json.dumps({"usage": CHAT})}, None),
        ({"text": json.dumps({"usage": CHAT}), "usage": {"prompt_tokens": 1, "completion_tokens": 1}}, (1, 1, None)),
        ([{"usage": CHAT}], None),
    ],
)
def test_a_usage_is_a_key_of_the_response_itself(value: Any, expected: Any, separators: tuple[str, str]) -> None:
    body = json.dumps(value, separators=separators).encode()
    assert stated_usage(body) == (None if expected is None else TokenUsage(*expected))
    assert stated_usage(bytearray(body)) == stated_usage(body)


@pytest.mark.parametrize(
    "odd", [b"", b"}", b"{}", b'{"usage":{"a":1', b'x"usage":{}},{"usage":{}}', b'{"x":"\\"usage\\":"}', b"\xff"]
)
def test_many_responses_state_what_each_of_them_states(odd: bytes) -> None:
    values = [
        {"id": "c", "usage": CHAT},
        {"id": "c"},
        {"id": "c", "usage": CHAT | {"prompt_tokens_details": {"cached_tokens": 4}}, "x": None},
        {"id": "m", "usage": {"input_tokens": 6, "output_tokens": 1}},
        {"usage": {"input_tokens": 1, "output_tokens": 8}, "content": [{"input": {"usage": CHAT}}]},
        {"id": "c", "usage": None},
    ]
    bodies = [json.dumps(value).encode() for value in values]
    expected = [(5, 2, None), None, (5, 2, 4), (6, 1, None), (1, 8, None), None]
    assert stated_usages(bodies) == [None if each is None else TokenUsage(*each) for each in expected]
    with_odd = [*bodies[:3], odd, *bodies[3:]]
    assert stated_usages(with_odd) == [stated_usage(body) for body in with_odd]
    assert stated_usages([]) == []


@pytest.mark.parametrize("body", [b"", b'"usage":', b'{"usage":{"prompt_tokens":1', b'xx"usage":{}}'])
def test_what_is_no_json_states_nothing(body: bytes) -> None:
    assert stated_usage(body) is None


def forwarded(summary: StreamSummary, data: bytes) -> None:
    """As `Connection.data_received` does for a chunk that it forwards without a look at its content."""
    summary.unread += 1
    summary.last = data


@pytest.mark.parametrize("end", [(), (DONE,), (USAGE, DONE)])
@pytest.mark.parametrize("texts", [1, 2, 5])
@pytest.mark.parametrize("how", ["read", "forwarded", "first read", "last read", "two read", "in turn"])
def test_events_with_text_are_counted(texts: int, end: tuple[bytes, ...], how: str) -> None:
    summary = StreamSummary(MARK, exact=False)
    summary.streamed = True
    events = [TEXT] * texts + list(end)
    for at, event in enumerate(events):
        left = len(events) - at
        read = {
            "read": True, "forwarded": False, "first read": at == 0, "last read": left == 1, "two read": left <= 2,
            "in turn": at % 2 == 0,
        }[how]  # fmt: skip
        if read or event is DONE:
            summary.add(event)
        else:
            forwarded(summary, event)
    assert summary.generated() == summary.generated() == texts
    assert summary.stated() == (TokenUsage(3, 7) if USAGE in end else None)


@pytest.mark.parametrize("lines", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("split", [False, True])
def test_the_usage_of_the_last_event_counts(lines: str, split: bool) -> None:
    """However its lines end, and also if its data has several lines."""
    data = json.dumps({"choices": [], "usage": CHAT}, indent=1 if split else None).split("\n")
    usage = "".join(f"data: {line}{lines}" for line in data) + lines
    for events in (TEXT + usage.encode(), TEXT + usage.encode() + DONE):
        summary = StreamSummary(MARK, exact=False)
        summary.streamed = True
        summary.add(USAGE)
        summary.add(events)
        assert summary.stated() == TokenUsage(5, 2)


def test_a_shortened_stream_keeps_its_counts() -> None:
    summary = StreamSummary(MARK, exact=False)
    summary.streamed = True
    for event in (TEXT, TEXT, USAGE):
        forwarded(summary, event)
    summary.add(DONE)
    summary.shorten()
    assert (summary.last, summary.before_last) == (b"", b"")
    assert (summary.stated(), summary.generated()) == (TokenUsage(3, 7), 2)
