"""Paths beside those that generate: tokens, scores, and responses read again."""

from typing import Any

import anthropic
import openai
import pytest

from tests.sim.calls import GUARD_S, INSTANT, JsonObject, at, decoded, post
from tests.sim.support import Start

SCORE_PATHS, RERANK_PATHS = ("/v1/score", "/score"), ("/v1/rerank", "/rerank", "/v2/rerank")
TURNS: Any = [{"role": "user", "content": "what is two and two"}]


async def test_tokens_are_counted_as_usage_counts_them(start: Start) -> None:
    _, session = await start(INSTANT)
    _, asked = await post(session, "/v1/messages", {"model": "sim", "messages": TURNS, "max_tokens": 1})
    assert await post(session, "/v1/messages/count_tokens", {"model": "sim", "messages": TURNS}) == (
        200,
        {"input_tokens": at(asked, "usage", "input_tokens"), "simulated": True},
    )
    _, told = await post(session, "/tokenize", {"model": "sim", "messages": TURNS, "return_token_strs": True})
    assert (told["count"], told["max_model_len"]) == (5, INSTANT.max_model_len)
    assert told["token_strs"] == ["what", " is", " two", " and", " two"]
    tokens = told["tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == 5
    assert tokens[2] == tokens[4]


async def test_the_anthropic_client_counts(start: Start) -> None:
    engine, _ = await start(INSTANT)
    async with anthropic.AsyncAnthropic(base_url=engine.url, api_key="x", max_retries=0, timeout=GUARD_S) as ai:
        counted = await ai.messages.count_tokens(model="sim", system="be brief", messages=TURNS)
    assert counted.input_tokens == 7


@pytest.mark.parametrize("text", ["what is  two\nand 17", "", "one", " spaces around "])
async def test_detokenize_gives_the_text_back(start: Start, text: str) -> None:
    _, session = await start(INSTANT)
    _, told = await post(session, "/tokenize", {"model": "sim", "prompt": text})
    assert told["token_strs"] is None
    _, back = await post(session, "/detokenize", {"model": "sim", "tokens": told["tokens"]})
    assert back["prompt"] == text.strip()


async def test_a_number_that_was_never_given_stands_for_itself(start: Start) -> None:
    _, session = await start(INSTANT)
    assert await post(session, "/detokenize", {"tokens": [7, 12]}) == (200, {"prompt": "7 12", "simulated": True})


@pytest.mark.parametrize("path", RERANK_PATHS)
async def test_a_rerank_sorts_the_documents(start: Start, path: str) -> None:
    _, session = await start(INSTANT)
    body: JsonObject = {"model": "sim", "query": "two", "documents": ["one", "two", "three"]}
    status, told = await post(session, path, body)
    assert status == 200
    results: Any = told["results"]
    assert results[0] == {"index": 1, "document": {"text": "two", "multi_modal": None}, "relevance_score": 1.0}
    scores = [one["relevance_score"] for one in results]
    assert scores == sorted(scores, reverse=True)
    assert told["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    _, first = await post(session, path, body | {"top_n": 1})
    assert first["results"] == results[:1]


@pytest.mark.parametrize("path", SCORE_PATHS)
@pytest.mark.parametrize(
    "names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
)
async def test_a_score_compares_one_text_with_many_or_pair_by_pair(
    start: Start, path: str, names: tuple[str, str]
) -> None:
    _, session = await start(INSTANT)
    one, many = names
    _, told = await post(session, path, {"model": "sim", one: "two", many: ["one", "two"]})
    data: Any = told["data"]
    assert [entry["index"] for entry in data] == [0, 1]
    assert (data[1]["score"], told["object"]) == (1.0, "list")
    assert 0 <= data[0]["score"] < 1
    _, pairs = await post(session, path, {"model": "sim", one: ["one", "two"], many: ["one", "two"]})
    assert [entry["score"] for entry in pairs["data"]] == [1.0, 1.0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/rerank", {"documents": ["a"]}, 400, "'query'"),
        ("/v1/rerank", {"query": "a", "documents": []}, 400, "'documents'"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, 400, "'top_n'"),
        ("/v1/rerank", {"model": "x", "query": "a", "documents": ["b"]}, 404, "does not exist"),
        ("/v1/score", {}, 400, "'queries'"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 400, "1:1, 1:N or N:N"),
        ("/v1/score", {"text_1": "a", "text_2": [{"content": []}]}, 400, "'text_2'"),
        ("/tokenize", {}, 400, "'prompt' or 'messages'"),
        ("/tokenize", {"model": "x", "prompt": "a"}, 404, "does not exist"),
        ("/detokenize", {"tokens": ["a"]}, 400, "'tokens'"),
        ("/detokenize", {"tokens": [-1]}, 400, "'tokens'"),
        ("/detokenize", {"tokens": [True]}, 400, "'tokens'"),
        ("/v1/messages/count_tokens", {"model": "sim"}, 400, "'messages'"),
    ],
)
async def test_a_wrong_body_is_refused(start: Start, path: str, body: JsonObject, status: int, message: str) -> None:
    _, session = await start(INSTANT)
    code, told = await post(session, path, body)
    assert code == status
    assert message in str(at(told, "error", "message"))


async def test_a_stored_response_can_be_read_again(start: Start) -> None:
    engine, session = await start(INSTANT)
    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="x", max_retries=0, timeout=GUARD_S) as ai:
        made = await ai.responses.create(model="sim", input="hello", max_output_tokens=3)
        assert (await ai.responses.retrieve(made.id)).model_dump() == made.model_dump()
        with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
            await ai.responses.cancel(made.id)
        unstored = await ai.responses.create(model="sim", input="hello", store=False)
        for call in (ai.responses.retrieve(unstored.id), ai.responses.cancel("resp_none")):
            with pytest.raises(openai.NotFoundError, match="not found"):
                await call
        with pytest.raises(openai.BadRequestError, match="cannot stream"):
            await ai.responses.retrieve(made.id, stream=True)
    async with session.delete(f"/v1/responses/{made.id}") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET,HEAD")
        assert decoded(await response.read())["error"]
