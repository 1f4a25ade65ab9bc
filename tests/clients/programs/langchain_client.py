"""langchain-openai."""

import asyncio
from collections.abc import Iterator
from typing import Any

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from tests.clients.programs.cases import BASE_URL, QUESTION, TOKEN, City, cut, left, run, waits


def model(name: str, *, token: str = TOKEN, max_retries: int = 0, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=BASE_URL, api_key=SecretStr(token), model=name, max_retries=max_retries, **options)


def streamed(name: str, **options: Any) -> Iterator[str]:
    for chunk in model(name, **options).stream(QUESTION):
        yield str(chunk.content)


@tool  # type: ignore[untyped-decorator]
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def tool_call() -> object:
    return model("math").bind_tools([add], tool_choice="any").invoke(QUESTION).tool_calls[0]["args"]


def usage() -> list[bool]:
    """langchain asks for the usage of a stream only with the option."""
    options: list[dict[str, Any]] = [{}, {"stream_usage": True}]
    return [any(chunk.usage_metadata for chunk in model("math", **one).stream(QUESTION)) for one in options]


def embedded() -> list[int]:
    """Without the last option, langchain fetches a tokenizer of OpenAI, and sends ids that mean other tokens here."""
    made = OpenAIEmbeddings(
        base_url=BASE_URL, api_key=SecretStr(TOKEN), model="math", max_retries=0, check_embedding_ctx_length=False
    )
    return [len(made.embed_documents(["a", "b"])), len(made.embed_query("a"))]


async def abandoned() -> list[object]:
    async for _ in model("endless").astream(QUESTION):
        break
    return [await asyncio.to_thread(left, "endless")]


def structured(**options: Any) -> object:
    made: Any = model("math").with_structured_output(City, **options).invoke(QUESTION)
    return made.model_dump()


run(
    {
        "chat": lambda: model("math").invoke(QUESTION).content == "".join(streamed("math")) != "",
        "tool": tool_call,
        "usage": usage,
        "parsed": structured,
        "parsed_by_tool": lambda: structured(method="function_calling"),
        "json_mode": lambda: model("math").with_structured_output(None, method="json_mode").invoke(QUESTION),
        "responses": lambda: model("math", use_responses_api=True).invoke(QUESTION).text != "",
        "embeddings": embedded,
        "wrong_token": lambda: model("math", token="wrong").invoke(QUESTION).content,
        "unknown": lambda: model("poetry").invoke(QUESTION).content,
        "busy": lambda: model("busy").invoke(QUESTION).content,
        "away": lambda: model("away").invoke(QUESTION).content,
        "recovering": lambda: waits(lambda: model("recovering", max_retries=1).invoke(QUESTION).content != ""),
        "slow": lambda: model("slow", max_retries=2).invoke(QUESTION).content,
        "cut": lambda: cut(streamed("broken")),
        "abandoned": abandoned,
    }
)
