"""litellm, as a library."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import litellm

from tests.clients.programs.cases import BASE_URL, MESSAGES, QUESTION, TOKEN, URL, City, cut, left, run, waits

OPTIONS: Any = {"api_base": BASE_URL, "api_key": TOKEN, "max_retries": 0}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def ask(model: str, **options: Any) -> Any:
    return litellm.completion(model=f"openai/{model}", messages=MESSAGES, **(OPTIONS | options))


def said(model: str, **options: Any) -> str:
    return str(ask(model, **options).choices[0].message.content)


def streamed(model: str) -> Iterator[str]:
    for chunk in ask(model, stream=True):
        yield chunk.choices[0].delta.content or ""


def abandoned() -> list[object]:
    """`break` alone leaves the connection open until the garbage collector runs."""
    with ask("endless", stream=True) as stream:
        pieces = len(list(islice(stream, 3)))
    return [pieces, left("endless")]


def anthropic() -> list[object]:
    made: Any = litellm.completion(
        model="anthropic/math", messages=MESSAGES, api_base=URL, api_key=TOKEN, max_tokens=40
    )
    return [made.choices[0].message.content != "", made.usage.prompt_tokens > 0]


def embedded() -> int:
    made: Any = litellm.embedding(model="openai/math", input=["a", "b"], api_base=BASE_URL, api_key=TOKEN)
    return len(made.data)


def response() -> bool:
    made: Any = litellm.responses(model="openai/math", input=QUESTION, api_base=BASE_URL, api_key=TOKEN)
    return bool(made.output[0].content[0].text != "")


run(
    {
        "chat": lambda: said("math") == "".join(streamed("math")) != "",
        "hosted_vllm": lambda: (
            litellm.completion(model="hosted_vllm/math", messages=MESSAGES, **OPTIONS).choices[0].message.content != ""
        ),
        "tool": lambda: (
            ask("math", tools=[ADD], tool_choice="required").choices[0].message.tool_calls[0].function.arguments
        ),
        "parsed": lambda: City.model_validate_json(said("math", response_format=City)).model_dump(),
        "response": response,
        "anthropic": anthropic,
        "embeddings": embedded,
        "wrong_token": lambda: said("math", api_key="wrong"),
        "unknown": lambda: said("poetry"),
        "busy": lambda: said("busy"),
        "away": lambda: said("away"),
        "recovering": lambda: waits(lambda: said("recovering", max_retries=1) != ""),
        "slow": lambda: said("slow", max_retries=2),
        "cut": lambda: cut(streamed("broken"))[:2],
        "abandoned": abandoned,
    }
)
