"""The official Anthropic client."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import anthropic
from pydantic import BaseModel

from tests.clients.programs.cases import MESSAGES, TOKEN, URL, City, cut, left, run, waits

client = anthropic.Anthropic(base_url=URL, api_key=TOKEN, max_retries=0)
ADD: Any = {
    "name": "add",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}


def ask(model: str, own: anthropic.Anthropic = client, **options: Any) -> anthropic.types.Message:
    made: anthropic.types.Message = own.messages.create(model=model, messages=MESSAGES, max_tokens=40, **options)
    return made


def said(model: str) -> str:
    block: Any = ask(model).content[0]
    return str(block.text)


def streamed(model: str) -> Iterator[str]:
    with client.messages.stream(model=model, messages=MESSAGES, max_tokens=40) as stream:
        yield from stream.text_stream


def tool_call() -> list[object]:
    first = ask("math", tools=[ADD], tool_choice={"type": "any"})
    call: Any = first.content[0]
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "42"}
    turns: Any = [*MESSAGES, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    then: Any = client.messages.create(model="math", max_tokens=40, tools=[ADD], messages=turns)
    return [call.name, call.input, first.stop_reason, then.content[0].type]


class Town(BaseModel):
    name: str
    founded: int
    tags: list[str]


def parsed(model: type[BaseModel]) -> object:
    made = client.messages.parse(model="math", messages=MESSAGES, max_tokens=200, output_format=model).parsed_output
    assert made
    return made.model_dump()


def abandoned() -> list[object]:
    with client.messages.stream(model="endless", messages=MESSAGES, max_tokens=4000) as stream:
        pieces = len(list(islice(stream.text_stream, 3)))
    return [pieces, left("endless")]


run(
    {
        "chat": lambda: said("math") == "".join(streamed("math")) != "",
        "tool": tool_call,
        "parsed": lambda: parsed(Town),
        "parsed_bounds": lambda: parsed(City),
        "wrong_token": lambda: ask("math", client.with_options(api_key="wrong")).id,
        "unknown": lambda: ask("poetry").id,
        "busy": lambda: ask("busy").id,
        "away": lambda: ask("away").id,
        "recovering": lambda: waits(lambda: ask("recovering", client.with_options(max_retries=1)).id != ""),
        "slow": lambda: ask("slow", client.with_options(max_retries=2)).id,
        "cut": lambda: cut(streamed("broken"))[:2],
        "abandoned": abandoned,
    }
)
