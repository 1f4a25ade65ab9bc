"""An answer that its engine has cut and ended in good form is a failure, in every API and however it is framed."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.errors import UpstreamAbortedError
from hpc_router.net import protocol
from hpc_router.relay.aborted_responses import ChoicesAbortDetector, UnbufferedAbortDetector, ends_stream
from hpc_router.relay.sse import CONTENT_TYPE
from tests.relay.scripted import CHUNKED, Answer, End, head, sized
from tests.relay.serving import Client, relayed
from tests.support.relays import Relay
from tests.support.waiting import eventually

EVENTS = head(CHUNKED, b"content-type: " + CONTENT_TYPE)
ERROR = b"event: error\n\n"
COMPACT = (",", ":")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: Any, *, compact: bool = True) -> bytes:
    name = b"event: %b\n" % value["type"].encode() if "type" in value else b""
    return b"%bdata: %b\n\n" % (name, json.dumps(value, separators=COMPACT if compact else None).encode())


def delta(content: str | None, reason: str | None = None, *, index: int = 0) -> dict[str, Any]:
    said = {} if content is None else {"content": content}
    return {"object": "chat.completion.chunk", "choices": [{"index": index, "delta": said, "finish_reason": reason}]}


def text(said: str, reason: str | None = None) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": said, "finish_reason": reason}]}


def completion(reason: str, *, content: str = "so far") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": reason}]}


def message(reason: str | None) -> dict[str, Any]:
    return {"type": "message", "content": [{"type": "text", "text": "so far"}], "stop_reason": reason}


def response(status: str, **more: Any) -> dict[str, Any]:
    return {"object": "response", "status": status} | {"output": []} | more


def says(words: str) -> dict[str, Any]:
    return {"output": [{"type": "message", "content": [{"type": "output_text", "text": words}]}]}


STARTED = {"type": "message_start", "message": message(None)}
DELTA = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "so"}}
STOPPED = {"type": "message_stop"}
DONE = b"data: [DONE]\n\n"


def reason_is(reason: str | None) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {}}


CUT_STREAMS: dict[str, tuple[str, list[bytes]]] = {
    "chat": (protocol.CHAT, [event(delta("so")), event(delta("", "abort")), DONE]),
    "chat with spaces": (protocol.CHAT, [event(delta("so")), event(delta("", "abort"), compact=False), DONE]),
    "chat, one of two choices": (
        protocol.CHAT,
        [event(delta("so")), event(delta("", "stop")), event(delta("", "abort", index=1)), DONE],
    ),
    "text": (protocol.COMPLETIONS, [event(text("so")), event(text("", "abort")), DONE]),
    "messages": (protocol.MESSAGES, [event(STARTED), event(DELTA), event(reason_is(None)), event(STOPPED)]),
    "messages with spaces": (
        protocol.MESSAGES,
        [event(STARTED), event(reason_is(None), compact=False), event(STOPPED, compact=False)],
    ),
    "responses": (
        protocol.RESPONSES,
        [
            event({"type": "response.created", "response": response("in_progress")}),
            event({"type": "response.completed", "response": response("cancelled")}),
        ],
    ),
    "responses that are empty": (
        protocol.RESPONSES,
        [
            event({"type": "response.created", "response": response("in_progress")}),
            event({"type": "response.completed", "response": response("completed", usage={"output_tokens": 0})}),
        ],
    ),
}
WHOLE_STREAMS: dict[str, tuple[str, list[bytes]]] = {
    "chat": (protocol.CHAT, [event(delta("so")), event(delta("", "stop")), DONE]),
    "a token that is the word": (protocol.CHAT, [event(delta("abort")), event(delta("", "stop")), DONE]),
    "a text that quotes an end": (
        protocol.CHAT,
        [event(delta('{"finish_reason":"abort"}')), event(delta("", "length")), DONE],
    ),
    "messages": (protocol.MESSAGES, [event(STARTED), event(DELTA), event(reason_is("end_turn")), event(STOPPED)]),
    "messages whose reason comes first": (
        protocol.MESSAGES,
        [event(STARTED), event(reason_is("max_tokens")), event(reason_is(None)), event(STOPPED)],
    ),
    "messages without reasons": (protocol.MESSAGES, [event(STARTED), event(DELTA), event(STOPPED)]),
    "responses that quote a status": (
        protocol.RESPONSES,
        [event({"type": "response.completed", "response": response("completed", metadata={"status": "cancelled"})})],
    ),
}


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "two at once"])
@pytest.mark.parametrize(("path", "events"), CUT_STREAMS.values(), ids=CUT_STREAMS)
async def test_a_cut_stream_ends_in_an_error_event(
    relay: Relay, path: str, events: list[bytes], together: bool
) -> None:
    """And not in what the engine says."""
    pieces = [events[0], b"".join(events[1:])] if together else events
    async with relayed(relay, [EVENTS, *map(chunk, pieces), b"0\r\n\r\n"], path=path) as at, Client(at.port) as client:
        await client.get()
        assert await client.status() == 200
        received = await client.until(b"0\r\n\r\n")
        assert received.startswith(chunk(events[0]))
        assert received.endswith(chunk(ERROR) + b"0\r\n\r\n")
        assert events[-1] not in received
        assert at.ends == ["UpstreamAbortedError"]


@pytest.mark.parametrize(("path", "events"), WHOLE_STREAMS.values(), ids=WHOLE_STREAMS)
async def test_a_whole_stream_passes_as_it_is(relay: Relay, path: str, events: list[bytes]) -> None:
    async with relayed(relay, [EVENTS, *map(chunk, events), b"0\r\n\r\n"], path=path) as at, Client(at.port) as client:
        await client.get("Connection: close", version="1.0")
        await client.head()
        assert await client.rest() == b"".join(events)
        assert at.ends == ["complete"]


FAILURES = {
    "a reset": [End.RESET],
    "an early close": [End.CLOSE],
    "a tail": [chunk(b"data: {"), b"0\r\n\r\n"],
    "a tail and a reset": [chunk(b"data: {"), End.RESET],
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "at once"])
@pytest.mark.parametrize(("path", "events"), WHOLE_STREAMS.values(), ids=WHOLE_STREAMS)
async def test_nothing_is_added_to_a_whole_stream_that_does_not_end_cleanly(
    relay: Relay, path: str, events: list[bytes], together: bool, failure: list[bytes | End]
) -> None:
    pieces = [b"".join(events)] if together else events
    answer = [EVENTS, *map(chunk, pieces), End.PAUSE, *failure]
    async with relayed(relay, answer, path=path) as at, Client(at.port) as client:
        await client.get("Connection: close", version="1.0")
        await client.head()
        await client.until(events[-1])
        at.upstream.go_on.release()
        assert await client.rest() == b""
        assert at.ends == ["complete"]


@pytest.mark.parametrize("events", [[delta("so")], [delta("so"), delta("", "stop")], [delta("[DONE]")]])
async def test_a_stream_without_its_final_event_that_does_not_end_cleanly_is_an_error(
    relay: Relay, events: list[dict[str, Any]]
) -> None:
    answer: Answer = [EVENTS, *(chunk(event(value)) for value in events), End.PAUSE, End.RESET]
    async with relayed(relay, answer) as at, Client(at.port) as client:
        await client.get()
        await client.head()
        await client.until(chunk(event(events[-1])))
        at.upstream.go_on.release()
        assert await client.until(b"0\r\n\r\n") == chunk(ERROR) + b"0\r\n\r\n"
        assert at.ends == ["UpstreamError"]


async def test_a_stream_that_is_cut_before_its_first_event_can_go_elsewhere(relay: Relay) -> None:
    answer = [EVENTS, chunk(event(delta("")) + event(delta("", "abort")) + DONE), b"0\r\n\r\n"]
    async with relayed(relay, answer) as at, Client(at.port) as client:
        await client.get()
        assert await client.status() == 502


async def test_an_end_that_the_engine_did_not_close_is_looked_at_as_well(relay: Relay) -> None:
    answer = [EVENTS, chunk(event(delta("so"))), chunk(event(delta("", "abort"))[:-1]), b"0\r\n\r\n"]
    async with relayed(relay, answer) as at, Client(at.port) as client:
        await client.get()
        await client.head()
        assert (await client.until(b"0\r\n\r\n")).endswith(chunk(ERROR) + b"0\r\n\r\n")


CUT_BODIES = {
    "chat": (protocol.CHAT, completion("abort")),
    "text": (protocol.COMPLETIONS, text("so far", "abort")),
    "messages": (protocol.MESSAGES, message(None)),
    "responses": (protocol.RESPONSES, response("cancelled")),
    "responses that are empty": (protocol.RESPONSES, response("completed", usage={"output_tokens": 0})),
    "responses with an empty text": (protocol.RESPONSES, response("completed", **says(""), usage={"output_tokens": 0})),
}
WHOLE_BODIES = {
    "chat": (protocol.CHAT, completion("stop", content="abort")),
    "chat without choices": (protocol.CHAT, {"error": "abort"}),
    "embeddings": (protocol.EMBEDDINGS, {"object": "list", "data": [], "model": "abort"}),
    "messages": (protocol.MESSAGES, message("end_turn")),
    "messages that hold another": (protocol.MESSAGES, message("tool_use") | {"content": [message(None)]}),
    "responses": (protocol.RESPONSES, response("completed", metadata={"status": "cancelled"})),
    "responses that end at once": (protocol.RESPONSES, response("completed", usage={"output_tokens": 1})),
    "responses that are not counted": (
        protocol.RESPONSES,
        response("completed", **says("hi"), usage={"output_tokens": 0}),
    ),
    "responses that call a tool": (
        protocol.RESPONSES,
        response("completed", output=[{"type": "function_call"}], usage={"output_tokens": 0}),
    ),
}


def framed(body: bytes, *, chunks: bool) -> Answer:
    return [head(CHUNKED), *[chunk(bytes([byte])) for byte in body], b"0\r\n\r\n"] if chunks else [sized(body)]


@pytest.mark.parametrize("chunks", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("separators", [COMPACT, None], ids=["compact", "spaced"])
@pytest.mark.parametrize(("path", "value"), CUT_BODIES.values(), ids=CUT_BODIES)
async def test_a_cut_answer_can_go_elsewhere(
    relay: Relay, path: str, value: Any, separators: tuple[str, str] | None, chunks: bool
) -> None:
    body = json.dumps(value, separators=separators).encode()
    async with relayed(relay, framed(body, chunks=chunks), path=path) as at, Client(at.port) as client:
        await client.get()
        assert await client.status() == 502
        assert at.ends == ["UpstreamAbortedError"]


@pytest.mark.parametrize("chunks", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize(("path", "value"), WHOLE_BODIES.values(), ids=WHOLE_BODIES)
async def test_a_whole_answer_passes_as_it_is(relay: Relay, path: str, value: Any, chunks: bool) -> None:
    body = json.dumps(value).encode()
    async with relayed(relay, framed(body, chunks=chunks), path=path) as at, Client(at.port) as client:
        await client.get("Connection: close")
        assert (await client.rest()).endswith(b"\r\n\r\n" + body)
        assert at.ends == ["complete"]


async def test_a_long_cut_answer_is_held_and_can_go_elsewhere(relay: Relay) -> None:
    body = json.dumps(completion("abort", content="x" * 2**18)).encode()
    async with relayed(relay, [sized(body)]) as at, Client(at.port) as client:
        await client.get()
        assert await client.status() == 502


@pytest.mark.parametrize("chunks", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("separators", [COMPACT, None], ids=["compact", "spaced"])
async def test_what_could_not_be_held_breaks_the_connection(
    relay: Relay, separators: tuple[str, str] | None, chunks: bool
) -> None:
    body = json.dumps(completion("abort", content="x" * 2**16), separators=separators).encode()
    first, last = body[:-99], body[-99:]
    answer: Answer = [head(b"content-length: %d" % len(body)), first, End.PAUSE, last]
    if chunks:
        answer = [head(CHUNKED), chunk(first), End.PAUSE, *framed(last, chunks=True)[1:]]
    async with relayed(relay, answer, buffer_bytes=2**10) as at, Client(at.port) as client:
        await client.get()
        assert await client.status() == 200
        at.upstream.go_on.release()
        assert b'"abort"' not in await client.rest()
        await eventually(lambda: at.ends == ["UpstreamAbortedError"])


async def test_a_stream_of_another_kind_breaks_the_connection(relay: Relay) -> None:
    lines = [json.dumps(value).encode() + b"\n" for value in (delta("so"), delta("", "abort"))]
    answer: Answer = [head(CHUNKED), chunk(lines[0]), End.PAUSE, chunk(lines[1]), b"0\r\n\r\n"]
    async with relayed(relay, answer, stream=True) as at, Client(at.port) as client:
        await client.get()
        await client.head()
        assert await client.until(chunk(lines[0])) == chunk(lines[0])
        at.upstream.go_on.release()
        assert await client.rest() == b""
        await eventually(lambda: at.ends == ["UpstreamAbortedError"])


@given(st.integers(0, 80), st.lists(st.integers(0, 300), max_size=12), st.sampled_from([b"", b" ", b"\n  "]))
def test_the_end_of_an_unheld_body_is_found_however_it_is_cut(before: int, cuts: list[int], space: bytes) -> None:
    body = b"x" * before + b'{"finish_reason":%b"abort"}' % space + b"y" * 100
    places = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    unheld = UnbufferedAbortDetector()

    def check_all() -> None:
        for start, stop in pairwise(places):
            unheld.check(body[start:stop])

    with pytest.raises(UpstreamAbortedError):
        check_all()


@pytest.mark.parametrize("value", [[], {}, {"choices": None}, {"choices": {}}, {"choices": [None, 1, []]}, "abort", 1])
def test_odd_shapes_are_no_abort(value: Any) -> None:
    body = json.dumps([value, "abort"]).encode() if not isinstance(value, dict) else json.dumps(value).encode()
    ChoicesAbortDetector().check_body(body)
    ChoicesAbortDetector().check_events(b"data: " + body + b"\n\n")


@pytest.mark.parametrize("kind", ["message_stop", "response.completed", "response.incomplete", "response.failed"])
def test_events_that_end_a_stream(kind: str) -> None:
    """After one of them the response is complete, even if the connection then ends with an error."""
    delta = b'data: {"type": "response.output_text.delta", "delta": "x"}\n\n'
    last = f'event: {kind}\ndata: {{"type": "{kind}", "response": {{}}}}\n\n'.encode()
    assert ends_stream(delta + last)
    assert not ends_stream(last + delta)
    assert not ends_stream(delta)
