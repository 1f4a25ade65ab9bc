"""`/v1/responses` and `/v1/messages`, over raw HTTP and through the official clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from hpc_router.sim.generation import ParsedPrompt
from hpc_router.sim.response_store import ResponseStore
from hpc_router.sim.server import SimServer
from hpc_router.sim.tokens import Completion
from tests.sim import calls
from tests.sim.calls import DISCONNECTED, GUARD_S, JsonObject, at, post, typed, until
from tests.sim.support import Start

INSTANT = replace(calls.INSTANT, max_tokens_default=100)
"""Answers end by themselves after at least 50 tokens, so `max_tokens` of 10 gives exactly 10."""
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TURNS: Any = [{"role": "user", "content": "what is two and two"}]
BODIES: dict[str, JsonObject] = {
    RESPONSES: {"model": "sim", "input": TURNS, "max_output_tokens": 10},
    MESSAGES: {"model": "sim", "messages": TURNS, "max_tokens": 10},
}
DELTAS = {RESPONSES: b'"response.output_text.delta"', MESSAGES: b'"content_block_delta"'}
both = pytest.mark.parametrize("path", [RESPONSES, MESSAGES])


@asynccontextmanager
async def open_ai(engine: SimServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="x", max_retries=0, timeout=GUARD_S) as made:
        yield made


@asynccontextmanager
async def an_anthropic(engine: SimServer) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=engine.url, api_key="x", max_retries=0, timeout=GUARD_S) as made:
        yield made


async def raw_stream(session: aiohttp.ClientSession, path: str, **more: object) -> bytes:
    """Returns the bytes of a stream that were received."""
    received = bytearray()
    try:
        async with session.post(path, json={**BODIES[path], "stream": True, **more}) as response:
            async for chunk in response.content.iter_any():
                received += chunk
    except DISCONNECTED:
        received += b"<broken>"
    return bytes(received)


async def test_a_response_comes_in_typed_events_that_say_what_the_body_says(start: Start) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, RESPONSES, BODIES[RESPONSES])
    assert body["simulated"] is True
    assert (body["status"], at(body, "incomplete_details", "reason")) == ("incomplete", "max_output_tokens")
    events = typed(await raw_stream(session, RESPONSES))
    assert [e["type"] for e in events] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * 10,
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [e["sequence_number"] for e in events] == list(range(18))
    text = "".join(str(e["delta"]) for e in events if "delta" in e)
    assert text == events[-4]["text"] == at(body, "output", 0, "content", 0, "text")
    assert at(events[-1], "response", "usage") == body["usage"]
    assert {key: at(body, "usage", key) for key in ("input_tokens", "output_tokens", "total_tokens")} == {
        "input_tokens": 5, "output_tokens": 10, "total_tokens": 15,
    }  # fmt: skip
    assert str(at(events[0], "response", "id")).startswith("resp_")


async def test_a_message_comes_in_typed_events_that_say_what_the_body_says(start: Start) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, MESSAGES, BODIES[MESSAGES])
    assert (body["simulated"], body["stop_reason"]) == (True, "max_tokens")
    assert body["usage"] == {"input_tokens": 5, "output_tokens": 10}
    events = typed(await raw_stream(session, MESSAGES))
    assert [e["type"] for e in events] == [
        "message_start", "ping", "content_block_start", *["content_block_delta"] * 10, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    text = "".join(str(at(e, "delta", "text")) for e in events if e["type"] == "content_block_delta")
    assert text == at(body, "content", 0, "text")
    assert (events[-2]["usage"], at(events[-2], "delta", "stop_reason")) == (body["usage"], "max_tokens")


async def test_the_openai_client_continues_a_response(start: Start) -> None:
    """Earlier turns are counted and change the answer. A response that was not stored is not found, in vLLM's words."""
    engine, _ = await start(INSTANT)
    async with open_ai(engine) as ai:
        first = await ai.responses.create(model="sim", instructions="be brief", input="one two three")
        assert first.status == "completed"
        assert first.usage is not None
        assert first.usage.input_tokens == 5
        again = await ai.responses.create(model="sim", input="four", previous_response_id=first.id)
        assert again.usage is not None
        assert again.usage.input_tokens == first.usage.total_tokens + 1
        assert again.previous_response_id == first.id
        alone = await ai.responses.create(model="sim", input="four", store=False)
        assert alone.output_text != again.output_text
        async with ai.responses.stream(model="sim", input="five", previous_response_id=again.id) as told:
            last = await told.get_final_response()
        assert last.usage is not None
        assert last.usage.input_tokens == again.usage.total_tokens + 1
        for unknown in (alone.id, "resp_0"):
            with pytest.raises(openai.NotFoundError, match=f"Response with id '{unknown}' not found"):
                await ai.responses.create(model="sim", input="x", previous_response_id=unknown)


async def test_a_response_that_broke_off_is_not_stored(start: Start) -> None:
    engine, session = await start(INSTANT)
    raw = await raw_stream(session, RESPONSES, sim_fault={"kind": "cut", "at": 10})
    name = str(at(typed(raw.partition(b"\n\n")[0])[0], "response", "id"))
    async with open_ai(engine) as ai:
        with pytest.raises(openai.NotFoundError):
            await ai.responses.create(model="sim", input="x", previous_response_id=name)


def test_only_the_last_responses_are_stored() -> None:
    store, prompt = ResponseStore(max_responses=2), ParsedPrompt(text="user: hi", tokens=1)
    for name in "abc":
        store.add(name, prompt, Completion(pieces=("yes",), tokens=1, finish_reason="stop"), lambda: b"{}")
    assert store.continued("a", prompt) is None
    assert (store.body("a"), store.body("c")) == (None, b"{}")
    assert store.continued("c", prompt) == ParsedPrompt(text="user: hi\nassistant: yes\nuser: hi", tokens=3)


async def test_the_anthropic_client_is_served(start: Start) -> None:
    engine, _ = await start(INSTANT)
    async with an_anthropic(engine) as ai:
        system = [{"type": "text", "text": "be brief"}]
        turns = [
            *TURNS,
            {"role": "assistant", "content": "four"},
            {"role": "user", "content": [{"type": "text", "text": "why"}]},
        ]
        told = await ai.messages.create(model="sim", max_tokens=4, messages=turns, system=system)  # type: ignore[arg-type]
        assert told.usage.input_tokens == 9
        stopped = await ai.messages.create(model="sim", max_tokens=9, messages=TURNS, stop_sequences=["answer"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "answer")
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            await ai.messages.create(model="other", max_tokens=4, messages=TURNS)
        with pytest.raises(anthropic.BadRequestError, match="non-empty list"):
            await ai.messages.create(model="sim", max_tokens=4, messages=[])
        fault = {"sim_fault": {"kind": "status", "status": 429}}
        with pytest.raises(anthropic.RateLimitError, match="simulated fault"):
            await ai.messages.create(model="sim", max_tokens=4, messages=TURNS, extra_body=fault)


@both
@pytest.mark.parametrize("at_token", [0, 4, 10])
async def test_an_error_event_is_one_that_the_clients_raise_on(start: Start, path: str, at_token: int) -> None:
    engine, session = await start(INSTANT)
    raw = await raw_stream(session, path, sim_fault={"kind": "error_event", "at": at_token, "message": "engine lost"})
    events = typed(raw)
    assert raw.count(DELTAS[path]) == at_token
    assert (events[-1]["type"], at(events[-1], "error", "message")) == ("error", "engine lost")
    assert engine.counts.finished == {"error": 1}


async def test_the_clients_raise_on_an_error_event(start: Start) -> None:
    engine, _ = await start(INSTANT)
    fault = {"sim_fault": {"kind": "error_event", "at": 2, "message": "lost"}}
    async with open_ai(engine) as ai, an_anthropic(engine) as other:
        response = await ai.responses.create(model="sim", input="x", stream=True, extra_body=fault)
        with pytest.raises(openai.APIError, match="lost"):
            await drained(response)
        message = await other.messages.create(model="sim", max_tokens=9, messages=TURNS, stream=True, extra_body=fault)
        with pytest.raises(anthropic.APIError, match="lost"):
            await drained(message)


async def drained(events: AsyncIterator[object]) -> None:
    async for _ in events:
        pass


@both
@pytest.mark.parametrize("at_token", [0, 3, 10])
async def test_a_cut_ends_in_the_middle_of_an_event(start: Start, path: str, at_token: int) -> None:
    engine, session = await start(INSTANT)
    raw = await raw_stream(session, path, sim_fault={"kind": "cut", "at": at_token})
    whole, _, tail = raw.rpartition(b"\n\n")
    assert whole.count(DELTAS[path]) == at_token
    assert tail.endswith(b"<broken>")
    assert engine.counts.finished == {"error": 1}
    assert engine.counts.running == 0


@both
async def test_a_partial_body_announces_the_whole_length(start: Start, path: str) -> None:
    engine, session = await start(INSTANT)
    async with session.post(path, json={**BODIES[path], "sim_fault": {"kind": "partial_body"}}) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert engine.counts.finished == {"error": 1}


@both
@pytest.mark.parametrize(
    ("stream", "where", "phase"),
    [(True, "headers", "before_first_token"), (True, 4, "streaming"), (False, 4, "generating")],
)
async def test_leaving_aborts_at_once(start: Start, path: str, stream: bool, where: object, phase: str) -> None:
    engine, session = await start(replace(INSTANT, capacity=1))
    body = {**BODIES[path], "stream": stream, "sim_fault": {"kind": "hang", "at": where}}
    task = asyncio.create_task(post(session, path, body))
    await until(lambda: engine.counts.faults["hang"] == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(GUARD_S):
        await engine.idle()
    assert engine.counts.aborted == {phase: 1}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (RESPONSES, {}, "'input'"),
        (RESPONSES, {"input": []}, "'input'"),
        (RESPONSES, {"input": ["x"]}, "'input'"),
        (RESPONSES, {"input": [{"content": "x"}]}, "input[0]"),
        (RESPONSES, {"input": "x", "max_output_tokens": 0}, "'max_output_tokens'"),
        (RESPONSES, {"input": "x", "previous_response_id": 3}, "'previous_response_id'"),
        (RESPONSES, {"input": "x", "store": "maybe"}, "'store'"),
        (RESPONSES, {"input": "x", "temperature": 2.1}, "temperature must be in [0, 2], got 2.1."),
        (MESSAGES, {"max_tokens": 1}, "'messages'"),
        (MESSAGES, {"messages": TURNS}, "'max_tokens' is required"),
        (MESSAGES, {"messages": TURNS, "max_tokens": 1, "system": 3}, "system"),
        (MESSAGES, {"messages": TURNS, "max_tokens": 1, "stop_sequences": [1]}, "stop"),
    ],
)
async def test_bad_bodies_are_refused_by_name(start: Start, path: str, body: JsonObject, says: str) -> None:
    _, session = await start(INSTANT)
    status, refusal = await post(session, path, body)
    assert status == 400
    assert says in str(at(refusal, "error", "message"))
    assert refusal["simulated"] is True
    assert refusal.get("type") == ("error" if path == MESSAGES else None)


async def test_items_other_than_messages_add_no_text(start: Start) -> None:
    _, session = await start(INSTANT)
    said = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one two"}]}
    called = {"type": "function_call_output", "call_id": "c", "output": "three"}
    _, body = await post(session, RESPONSES, {"input": [said, called]})
    assert at(body, "usage", "input_tokens") == 2
