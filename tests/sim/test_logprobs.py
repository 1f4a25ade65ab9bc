"""Log probabilities and echo, in the formats of vLLM's protocol modules."""

import math
from typing import Any

import openai
import pytest

from tests.sim.calls import INSTANT, JsonObject, at, chat, decoded, post, stream, typed
from tests.sim.support import Start

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def asked(**more: object) -> JsonObject:
    return {"prompt": "one two three", "max_tokens": 4, "ignore_eos": True, "logprobs": 2, **more}


async def test_a_completion_lists_every_token_with_its_alternatives(start: Start) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, COMPLETIONS, asked())
    found: Any = at(body, "choices", 0, "logprobs")
    assert list(found) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    assert "".join(found["tokens"]) == at(body, "choices", 0, "text")
    assert found["text_offset"] == [sum(map(len, found["tokens"][:k])) for k in range(4)]
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert value == top[token] < 0
        assert len(top) == 2  # includes the token itself
        assert sum(map(math.exp, top.values())) <= 1


@pytest.mark.parametrize("prompt", ["one two three", [11, 22, 33]])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
async def test_echo_gives_the_prompt_and_its_log_probabilities(start: Start, prompt: object, max_tokens: int) -> None:
    """lm-eval's loglikelihood reads this: it sends the text or the token ids, with echo and logprobs=1."""
    _, session = await start(INSTANT)
    request = asked(prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens)
    _, body = await post(session, COMPLETIONS, request)
    text, found = str(at(body, "choices", 0, "text")), at(body, "choices", 0, "logprobs")
    tokens: Any = at(found, "tokens")
    assert text.startswith("one two three" if isinstance(prompt, str) else "11 22 33")
    assert "".join(tokens) == text
    assert len(tokens) == 3 + max_tokens
    assert at(found, "token_logprobs", 0) is at(found, "top_logprobs", 0) is None
    assert all(value < 0 for value in at(found, "token_logprobs")[1:])  # type: ignore[index]
    assert at(body, "usage", "completion_tokens") == max(1, max_tokens)
    assert at(body, "choices", 0, "finish_reason") == "length"
    prompt_logprobs: Any = at(body, "choices", 0, "prompt_logprobs")
    assert prompt_logprobs[0] is None
    (first,) = [entry for entry in prompt_logprobs[1].values() if entry["decoded_token"] == tokens[1]]
    assert (first["logprob"], first["rank"]) == (at(found, "token_logprobs", 1), 1)
    if not isinstance(prompt, str):
        assert "22" in prompt_logprobs[1]


async def test_the_same_prefix_has_the_same_log_probabilities(start: Start) -> None:
    """Two continuations of one context differ only in their own tokens."""
    _, session = await start(INSTANT)
    values = []
    for last in ("three", "four"):
        _, body = await post(session, COMPLETIONS, asked(prompt=f"one two {last}", echo=True, max_tokens=0))
        values.append(at(body, "choices", 0, "logprobs", "token_logprobs"))
    assert values[0][:2] == values[1][:2]  # type: ignore[index]
    assert values[0][2] != values[1][2]  # type: ignore[index]


async def test_without_echo_or_logprobs_there_is_no_more_than_before(start: Start) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, COMPLETIONS, {"prompt": "one", "max_tokens": 2, "echo": True})
    assert at(body, "choices", 0, "text") == "one" + "sim simulated"
    assert at(body, "choices", 0, "logprobs") is None
    _, body = await post(session, CHAT, chat(max_tokens=2))
    assert at(body, "choices", 0, "logprobs") is None


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stop", [None, " answer"])
async def test_a_stream_of_log_probabilities_says_what_the_body_says(
    start: Start, echo: bool, stop: str | None
) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, COMPLETIONS, asked(echo=echo, stop=stop))
    chunks = [
        decoded(chunk)
        for chunk in (await stream(session, asked(echo=echo, stop=stop, stream=True), path=COMPLETIONS))[:-1]
    ]
    assert "".join(str(at(chunk, "choices", 0, "text")) for chunk in chunks) == at(body, "choices", 0, "text")
    joined: dict[str, list[object]] = {}
    for chunk in chunks:
        part: Any = at(chunk, "choices", 0, "logprobs") or {}
        for key, values in part.items():
            joined.setdefault(key, []).extend(values)
    assert joined == at(body, "choices", 0, "logprobs")


async def test_chat_lists_tokens_bytes_and_alternatives(start: Start) -> None:
    _, session = await start(INSTANT)
    request = chat(max_tokens=5, logprobs=True, top_logprobs=2)
    _, body = await post(session, CHAT, request)
    content: Any = at(body, "choices", 0, "logprobs", "content")
    assert "".join(entry["token"] for entry in content) == at(body, "choices", 0, "message", "content")
    for entry in content:
        assert list(entry) == ["token", "logprob", "bytes", "top_logprobs"]
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
    chunks = [decoded(chunk) for chunk in (await stream(session, request | {"stream": True}))[:-1]]
    parts: Any = [at(chunk, "choices", 0, "logprobs") for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == content
    assert parts[0] is None  # the event with the role


async def test_chat_gives_prompt_logprobs_and_echo(start: Start) -> None:
    _, session = await start(INSTANT)
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "so it is "}]
    _, body = await post(session, CHAT, {"messages": turns, "max_tokens": 2, "prompt_logprobs": 1, "echo": True})
    found: Any = body["prompt_logprobs"]
    assert len(found) == at(body, "usage", "prompt_tokens") == 5
    assert (found[0], len(found[1])) == (None, 1)
    assert at(body, "choices", 0, "message", "content") == "so it is " + "sim simulated"
    streamed = await stream(session, {"messages": turns, "max_tokens": 2, "echo": True, "stream": True})
    deltas: Any = [at(decoded(chunk), "choices", 0, "delta") for chunk in streamed[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "so it is sim simulated"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_response_includes_log_probabilities_where_they_are_asked_for(start: Start, streamed: bool) -> None:
    _, session = await start(INSTANT)
    request = {"input": "x", "max_output_tokens": 3, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    async with session.post(RESPONSES, json=request | {"stream": streamed}) as response:
        raw = await response.read()
    if not streamed:
        found: Any = at(decoded(raw), "output", 0, "content", 0, "logprobs")
    else:
        events = typed(raw)
        found = [entry for event in events if "delta" in event for entry in at(event, "logprobs")]  # type: ignore[attr-defined]
        assert at(events[-1], "response", "output", 0, "content", 0, "logprobs") == found
    assert [list(entry) for entry in found] == [["token", "logprob", "bytes", "top_logprobs"]] * 3
    assert len(found[0]["top_logprobs"]) == 1


async def test_the_openai_client_reads_them(start: Start) -> None:
    engine, _ = await start(INSTANT)
    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="x", max_retries=0) as ai:
        answer = await ai.chat.completions.create(
            model="sim", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=1, max_tokens=2
        )
        assert answer.choices[0].logprobs is not None
        assert len(answer.choices[0].logprobs.content or []) == 2
        text = await ai.completions.create(model="sim", prompt="x", logprobs=1, echo=True, max_tokens=1)
        assert text.choices[0].logprobs is not None
        assert text.choices[0].logprobs.tokens == ["x", "sim"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (COMPLETIONS, asked(logprobs=21), "Requested sample logprobs of 21, which is greater than max allowed: 20"),
        (COMPLETIONS, asked(logprobs=-2), "`logprobs` must be a positive value or -1."),
        (COMPLETIONS, asked(logprobs="2"), "`logprobs` must be an integer."),
        (COMPLETIONS, asked(prompt_logprobs=21), "Requested prompt logprobs of 21"),
        (COMPLETIONS, asked(max_tokens=0), "max_tokens must be at least 1, got 0."),
        (COMPLETIONS, asked(prompt_logprobs=1, stream=True), "`prompt_logprobs` are not available when `stream=True`."),
        (CHAT, chat(top_logprobs=1), "when using `top_logprobs`, `logprobs` must be set to true."),
        (CHAT, chat(logprobs=True, top_logprobs=-2), "`top_logprobs` must be a positive value or -1."),
        (CHAT, chat(logprobs=True, top_logprobs=21), "Requested sample logprobs of 21"),
        (CHAT, chat(logprobs=2), "'logprobs' must be true or false"),
        (CHAT, chat(prompt_logprobs=2, stream=True), "`prompt_logprobs` are not available when `stream=True`."),
        (CHAT, chat(logprob_token_ids=[1], logprobs=True), "'logprob_token_ids'"),
    ],
)
async def test_bad_numbers_are_refused_as_vllm_refuses_them(
    start: Start, path: str, body: JsonObject, says: str
) -> None:
    _, session = await start(INSTANT)
    status, refusal = await post(session, path, body)
    assert (status, says in str(at(refusal, "error", "message"))) == (400, True), refusal
