"""Where an answer ends: by itself, at max_tokens, or at the end of the context, as in vLLM."""

from dataclasses import replace
from typing import Any

import pytest

from tests.sim.calls import INSTANT, JsonObject, at, chat, post, stream
from tests.sim.support import Start

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
LIMITS = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
every_path = pytest.mark.parametrize("path", LIMITS)


def body(path: str, prompt: str = "what is two and two", /, **more: object) -> JsonObject:
    match path:
        case "/v1/completions":
            return {"prompt": prompt, **more}
        case "/v1/responses":
            return {"input": prompt, **more}
        case _:
            return {"messages": [{"role": "user", "content": prompt}], **more}


def end(path: str, answer: JsonObject) -> tuple[object, object]:
    """Returns the number of output tokens and why the answer ended, in chat's words."""
    match path:
        case "/v1/responses":
            return at(answer, "usage", "output_tokens"), {"completed": "stop", "incomplete": "length"}[
                str(answer["status"])
            ]
        case "/v1/messages":
            reasons = {"end_turn": "stop", "max_tokens": "length"}
            return at(answer, "usage", "output_tokens"), reasons[str(answer["stop_reason"])]
        case _:
            return at(answer, "usage", "completion_tokens"), at(answer, "choices", 0, "finish_reason")


@every_path
async def test_max_tokens_is_a_limit_and_not_a_length(start: Start, path: str) -> None:
    """The length is 0.5 to 1.5 times the mean of 16 tokens. It is determined by the prompt and differs between
    prompts."""
    _, session = await start(INSTANT)
    found = {}
    for prompt in ("one", "two", "three", "four", "five", "six"):
        (_, first), (_, again) = [
            await post(session, path, body(path, prompt, **{LIMITS[path]: limit})) for limit in (1000, 500)
        ]
        assert end(path, first) == end(path, again)
        found[prompt], reason = end(path, first)
        assert reason == "stop"
    lengths: list[Any] = list(found.values())
    assert all(8 <= length <= 24 for length in lengths)
    assert len(set(lengths)) > 2
    _, cut = await post(session, path, body(path, "one", **{LIMITS[path]: 3}))
    assert end(path, cut) == (3, "length")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
async def test_with_ignore_eos_max_tokens_is_the_length(start: Start, path: str) -> None:
    _, session = await start(INSTANT)
    _, answer = await post(session, path, body(path, **{"ignore_eos": True, LIMITS[path]: 300}))
    assert end(path, answer) == (300, "length")


async def test_min_tokens_puts_the_end_off(start: Start) -> None:
    _, session = await start(INSTANT)
    _, answer = await post(session, CHAT, chat(min_tokens=60, max_tokens=90))
    assert end(CHAT, answer) == (60, "stop")
    status, refusal = await post(session, CHAT, chat(min_tokens=60, max_tokens=9))
    assert (status, at(refusal, "error", "message")) == (
        400, "min_tokens must be less than or equal to max_tokens=9, got 60.",
    )  # fmt: skip


async def test_a_completion_without_max_tokens_has_sixteen_at_most(start: Start) -> None:
    _, session = await start(replace(INSTANT, max_tokens_default=100))
    _, answer = await post(session, COMPLETIONS, {"prompt": "x"})
    assert end(COMPLETIONS, answer) == (16, "length")


@every_path
async def test_max_tokens_is_cut_to_what_the_context_leaves(start: Start, path: str) -> None:
    """The context has 50 tokens, and the prompt takes 44 of them."""
    _, session = await start(replace(INSTANT, max_model_len=50))
    prompt = "word " * 44
    status, answer = await post(session, path, body(path, prompt, **{LIMITS[path]: 50}))
    assert (status, end(path, answer)) == (200, (6, "length"))
    if path != MESSAGES:
        _, answer = await post(session, path, body(path, prompt, ignore_eos=True, **{LIMITS[path]: 50}))
        assert end(path, answer) == (6, "length")


@every_path
async def test_more_than_the_whole_context_is_refused(start: Start, path: str) -> None:
    _, session = await start(replace(INSTANT, max_model_len=50))
    key = "max_completion_tokens" if path == MESSAGES else LIMITS[path]
    status, refusal = await post(session, path, body(path, **{LIMITS[path]: 51}))
    assert (status, at(refusal, "error", "message")) == (
        400,
        f"{key}=51 cannot be greater than max_model_len=50. Please request fewer output tokens.",
    )
    limit = {LIMITS[path]: 1}
    status, refusal = await post(session, path, body(path, "word " * 51, **limit))
    assert status == 400
    assert "your prompt contains 51 input tokens" in str(at(refusal, "error", "message"))
    status, refusal = await post(session, path, body(path, "word " * 50, **limit))
    assert (status, at(refusal, "error", "message")) == (400, "max_tokens must be at least 1, got 0.")


async def test_a_stream_ends_where_the_body_ends(start: Start) -> None:
    _, session = await start(INSTANT)
    _, answer = await post(session, CHAT, chat(max_tokens=100))
    chunks = await stream(session, chat(max_tokens=100, stream=True))
    assert len(chunks) == end(CHAT, answer)[0] + 3  # type: ignore[operator]


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ({"type": "item_reference", "id": "msg_1"}, "item_reference"),
        ({"type": "computer_call_output", "call_id": "c"}, "computer_call_output"),
        ({"id": "msg_1"}, "None"),
    ],
)
async def test_items_that_vllm_does_not_know_are_refused(start: Start, item: JsonObject, kind: str) -> None:
    _, session = await start(INSTANT)
    status, refusal = await post(session, RESPONSES, {"input": [{"role": "user", "content": "x"}, item]})
    assert (status, at(refusal, "error", "message")) == (400, f"Unsupported input item type: {kind}")


@pytest.mark.parametrize("field", [{"background": True}, {"prompt": {"id": "pmpt_1"}}])
async def test_what_runs_later_or_elsewhere_is_refused(start: Start, field: JsonObject) -> None:
    """vLLM runs a background response beside the request, and refuses prompt templates."""
    _, session = await start(INSTANT)
    status, refusal = await post(session, RESPONSES, {"input": "x"} | field)
    assert (status, at(refusal, "error", "param")) == (400, *field)
    status, _ = await post(session, RESPONSES, {"input": "x", "background": False, "prompt": None})
    assert status == 200


async def test_items_that_vllm_knows_are_served(start: Start) -> None:
    _, session = await start(INSTANT)
    items = [
        {"type": "message", "role": "user", "content": "x"},
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "y"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "y"},
    ]
    status, _ = await post(session, RESPONSES, {"input": items})
    assert status == 200
