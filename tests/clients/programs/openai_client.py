"""The official OpenAI client, synchronous and asynchronous."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import openai

from tests.clients.programs.cases import BASE_URL, MESSAGES, QUESTION, TOKEN, City, cut, left, run, waits

OPTIONS: Any = {"base_url": BASE_URL, "api_key": TOKEN, "max_retries": 0}
client = openai.OpenAI(**OPTIONS)
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def said(**options: Any) -> str:
    return client.chat.completions.create(messages=MESSAGES, **options).choices[0].message.content or ""


def streamed(model: str) -> Iterator[str]:
    for chunk in client.chat.completions.create(model=model, messages=MESSAGES, stream=True):
        yield chunk.choices[0].delta.content or ""


def usage() -> list[int]:
    *_, last = client.chat.completions.create(
        model="math", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, max_tokens=5,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    return [len(last.choices), last.usage.completion_tokens if last.usage else 0]


def tool_call() -> list[str]:
    first: Any = client.chat.completions.create(model="math", messages=MESSAGES, tools=[ADD], tool_choice="required")
    message = first.choices[0].message
    (call,) = message.tool_calls
    turns = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    then = client.chat.completions.create(model="math", tools=[ADD], messages=turns)
    return [call.function.name, call.function.arguments, "text" if then.choices[0].message.content else ""]


def tool_stream() -> str:
    with client.chat.completions.stream(model="math", messages=MESSAGES, tools=[ADD], tool_choice="required") as stream:
        calls: Any = stream.get_final_completion().choices[0].message.tool_calls
    return str(calls[0].function.arguments)


def parsed() -> object:
    made = client.chat.completions.parse(model="math", messages=MESSAGES, response_format=City)
    assert made.choices[0].message.parsed
    return made.choices[0].message.parsed.model_dump()


def parsed_stream() -> object:
    with client.chat.completions.stream(model="math", messages=MESSAGES, response_format=City) as stream:
        made = stream.get_final_completion().choices[0].message.parsed
    assert made
    return made.model_dump()


def parsed_response() -> object:
    made = client.responses.parse(model="math", input=QUESTION, text_format=City).output_parsed
    assert made
    return made.model_dump()


def response_stream() -> list[object]:
    events = list(client.responses.create(model="math", input=QUESTION, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last: Any = events[-1]
    return [last.type, text == last.response.output_text != ""]


def next_turn() -> bool:
    """A conversation that the engine has stored."""
    own = client.with_options(default_headers={"x-session-id": "openai-client"})
    first = own.responses.create(model="math", input=QUESTION)
    return own.responses.create(model="math", input="Why?", previous_response_id=first.id).output_text != ""


def abandoned() -> list[object]:
    stream = client.chat.completions.create(model="endless", messages=MESSAGES, stream=True)
    pieces = len(list(islice(stream, 3)))
    stream.close()
    return [pieces, left("endless")]


async def abandoned_async() -> list[object]:
    async with openai.AsyncOpenAI(**OPTIONS) as own:
        stream = await own.chat.completions.create(model="endless", messages=MESSAGES, stream=True)
        await anext(aiter(stream))
        await stream.close()
        return [left("endless")]


def timed_out() -> object:
    """The client gives up waiting, and the router stops the engine's work."""
    try:
        said(model="slow", timeout=0.3)
    except openai.APITimeoutError:
        return left("slow")
    return "no timeout"


run(
    {
        "models": lambda: sorted(model.id for model in client.models.list()),
        "chat": lambda: said(model="math") == "".join(streamed("math")) != "",
        "auto": lambda: client.chat.completions.with_raw_response.create(model="auto", messages=MESSAGES).headers[
            "x-expert"
        ],
        "usage": usage,
        "completion": lambda: client.completions.create(model="math", prompt=QUESTION).choices[0].text != "",
        "logprobs": lambda: said(model="math", logprobs=True, top_logprobs=2) != "",
        "tool": tool_call,
        "tool_stream": tool_stream,
        "parsed": parsed,
        "parsed_stream": parsed_stream,
        "parsed_response": parsed_response,
        "response_stream": response_stream,
        "next_turn": next_turn,
        "embeddings": lambda: len(client.embeddings.create(model="math", input=["a", "b"]).data),
        "wrong_token": lambda: client.with_options(api_key="wrong").models.list().data,
        "unknown": lambda: said(model="poetry"),
        "busy": lambda: said(model="busy"),
        "away": lambda: said(model="away"),
        "recovering": lambda: waits(
            lambda: (
                client.with_options(max_retries=1).chat.completions.create(model="recovering", messages=MESSAGES).id
                != ""
            )
        ),
        "slow": lambda: client.with_options(max_retries=2).chat.completions.create(model="slow", messages=MESSAGES).id,
        "cut": lambda: cut(streamed("broken")),
        "abandoned": abandoned,
        "abandoned_async": abandoned_async,
        "timed_out": timed_out,
    }
)
