"""Answers that must follow a JSON schema, in every API: complete JSON that pydantic accepts, or a refusal."""

import datetime
import json
import uuid
from typing import Annotated, Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field, TypeAdapter

from tests.sim.calls import GUARD_S, INSTANT, JsonObject, at, chat, decoded, post, stream, typed
from tests.sim.support import Start

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
TURNS: Any = [{"role": "user", "content": "hi"}]


class Node(BaseModel):
    name: str
    next: "Node | None" = None
    children: list["Node"]


class Everything(BaseModel):
    city: str = Field(min_length=12, max_length=14)
    days: Annotated[int, Field(gt=3, le=9)]
    share: Annotated[float, Field(ge=0.25, lt=0.75)]
    unit: Literal["celsius", "kelvin"]
    born: datetime.date
    at: datetime.datetime
    key: uuid.UUID
    tags: Annotated[list[str], Field(min_length=2)]
    pair: tuple[int, str]
    either: int | str | None
    counts: dict[str, int]
    tree: Node
    kind: Literal["only"]
    flag: bool


CIRCLE: JsonObject = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}


def unique(items: object, count: int) -> JsonObject:
    return {"type": "array", "items": items, "minItems": count, "uniqueItems": True}


SCHEMA = Everything.model_json_schema()
FORMAT = {"type": "json_schema", "json_schema": {"name": "everything", "schema": SCHEMA, "strict": True}}


def asked(path: str, schema: object = SCHEMA) -> JsonObject:
    """Returns a request to `path` whose answer must follow the schema."""
    match path:
        case "/v1/chat/completions":
            return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        case "/v1/completions":
            return {"prompt": "x", "max_tokens": 500, "structured_outputs": {"json": schema}}
        case "/v1/responses":
            return {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}
        case _:
            form = {"type": "json_schema", "schema": schema}
            return {"messages": TURNS, "max_tokens": 500, "output_config": {"format": form}}


def text(path: str, body: JsonObject) -> str:
    match path:
        case "/v1/chat/completions":
            return str(at(body, "choices", 0, "message", "content"))
        case "/v1/completions":
            return str(at(body, "choices", 0, "text"))
        case "/v1/responses":
            return str(at(body, "output", 0, "content", 0, "text"))
        case _:
            return str(at(body, "content", 0, "text"))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_an_answer_follows_its_json_schema(start: Start, path: str) -> None:
    _, session = await start(INSTANT)
    status, body = await post(session, path, asked(path))
    assert status == 200
    answer = Everything.model_validate_json(text(path, body))
    assert 12 <= len(answer.city) <= 14
    assert len(answer.tags) == 2
    assert answer.tree.children == []


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_a_structured_stream_says_what_the_body_says(start: Start, path: str) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, path, asked(path))
    if path == CHAT:
        events = [decoded(event) for event in (await stream(session, asked(path) | {"stream": True}))[:-1]]
        streamed = "".join(str(at(event, "choices", 0, "delta").get("content", "")) for event in events)  # type: ignore[attr-defined]
        assert at(events[-1], "choices", 0, "finish_reason") == "stop"
    else:
        async with session.post(path, json=asked(path) | {"stream": True}) as response:
            parts = [event.get("delta") for event in typed(await response.read()) if "delta" in event]
        streamed = "".join(
            str(part if isinstance(part, str) else at(part, "text"))
            for part in parts
            if part != parts[-1] or path == RESPONSES
        )
    assert streamed == text(path, body)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"enum": ["b", "a"]}, "b"),
        ({"const": {"a": 1}}, {"a": 1}),
        ({"type": ["null", "integer"], "minimum": 4}, 4),
        ({"type": "integer", "exclusiveMinimum": 2, "multipleOf": 5}, 5),
        ({"type": "number", "maximum": -1.5}, -1.5),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, 0.5),
        ({"type": "string", "maxLength": 3}, "sim"),
        ({"type": "string", "format": "date", "minLength": 10}, "2026-01-01"),
        ({"type": "string", "format": "ipv4"}, "192.0.2.1"),
        ({"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 3}, [1, 2, 2]),
        ({"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "uniqueItems": True}, [1, 2]),
        (unique({"$ref": "#/$defs/few"}, 2) | {"$defs": {"few": {"enum": ["red", "blue"]}}}, ["red", "blue"]),
        (unique({"type": "integer", "multipleOf": 7, "minimum": 1}, 3), [7, 14, 21]),
        (unique({"type": "string"}, 2), ["simulated", "simulated-"]),
        (unique({"type": "boolean"}, 2), [True, False]),
        ({"type": "object", "required": ["a"]}, {"a": "simulated"}),
        ({"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]}, {"a": 1, "b": 2}),
        ({"anyOf": [{"type": "null"}, {"const": 7}]}, 7),
        ({"oneOf": [{"type": "null"}]}, None),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 1}}}, 1),
        ({"properties": {"a": {"type": "integer"}}}, {"a": 0}),
        (True, "simulated"),
    ],
)
async def test_keywords_of_a_schema_are_followed(start: Start, schema: object, expected: object) -> None:
    _, session = await start(INSTANT)
    _, body = await post(
        session,
        CHAT,
        asked(CHAT, schema)
        if isinstance(schema, dict)
        else asked(COMPLETIONS) | chat(structured_outputs={"json": json.dumps(schema)}),
    )
    assert json.loads(text(CHAT, body)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, dict),
        ({"structured_outputs": {"json_object": True}}, dict),
        ({"structured_outputs": {"json": json.dumps({"type": "array", "items": {}})}}, list),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"json_object": True}}, dict),
    ],
)  # fmt: skip
async def test_json_without_a_json_schema_format(start: Start, fields: JsonObject, expected: type) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, CHAT, chat(**fields))
    assert isinstance(json.loads(text(CHAT, body)), expected)


async def test_a_choice_is_one_of_the_choices_and_plain_text_stays_text(start: Start) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, CHAT, chat(structured_outputs={"choice": ["yes it is", "no"]}))
    assert text(CHAT, body) == "yes it is"
    unconstrained: list[JsonObject] = [{"response_format": {"type": "text"}}, {"guided_json": SCHEMA}]
    for fields in unconstrained:  # vLLM 0.32 has no guided_json
        _, body = await post(session, CHAT, chat(**fields))
        assert text(CHAT, body).startswith("sim simulated answer")


async def test_json_that_max_tokens_cuts_ends_in_length(start: Start) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, CHAT, asked(CHAT) | {"max_tokens": 3})
    assert at(body, "choices", 0, "finish_reason") == "length"
    assert at(body, "usage", "completion_tokens") == 3


@pytest.mark.parametrize(
    ("path", "fields", "says"),
    [
        (CHAT, {"response_format": {"type": "xml"}}, "'response_format.type'"),
        (CHAT, {"response_format": 3}, "'response_format'"),
        (CHAT, {"response_format": {"type": "structural_tag", "format": {}}}, "structural_tag"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "the 'json_schema' field must be provided"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        (CHAT, {"structured_outputs": {}}, "You must use one kind of structured outputs constraint"),
        (CHAT, {"structured_outputs": {"json": {}, "choice": ["a"]}}, "You can only use one kind"),
        (CHAT, {"structured_outputs": {"json": "{"}}, "not valid JSON"),
        (CHAT, {"structured_outputs": {"regex": "a+"}}, "'structured_outputs.regex'"),
        (CHAT, {"structured_outputs": {"grammar": "root ::= x"}}, "'structured_outputs.grammar'"),
        (CHAT, {"structured_outputs": {"choice": []}}, "'structured_outputs.choice'"),
        (COMPLETIONS, {"structured_outputs": {"json": {"type": "string", "pattern": "^a+$"}}}, "'pattern'"),
        (COMPLETIONS, {"structured_outputs": {"json": {"not": {}}}}, "'not'"),
        (COMPLETIONS, {"structured_outputs": {"json": {"type": "word"}}}, "'word'"),
        (COMPLETIONS, {"structured_outputs": {"json": {"$ref": "#/$defs/x"}}}, "#/$defs/x"),
        (COMPLETIONS, {"structured_outputs": {"json": {"$ref": "#"}}}, "without an end"),
        (COMPLETIONS, {"structured_outputs": {"json": CIRCLE | {"allOf": [{"$ref": "#/$defs/a"}]}}}, "without an end"),
        (COMPLETIONS, {"structured_outputs": {"json": CIRCLE | unique({"$ref": "#/$defs/a"}, 2)}}, "without an end"),
        (COMPLETIONS, {"structured_outputs": {"json": unique({"type": "string", "maxLength": 9}, 2)}}, "'uniqueItems'"),
        (COMPLETIONS, {"structured_outputs": {"json": unique({"enum": ["a"]}, 2)}}, "'uniqueItems'"),
        (COMPLETIONS, {"structured_outputs": {"json": unique({"type": "integer", "maximum": 0}, 2)}}, "'maximum'"),
        (
            COMPLETIONS,
            {"structured_outputs": {"json": unique({"type": "string", "format": "uuid"}, 2)}},
            "'uniqueItems'",
        ),
        (COMPLETIONS, {"structured_outputs": {"json": {"enum": []}}}, "'enum'"),
        (COMPLETIONS, {"structured_outputs": {"json": {"type": "integer", "minimum": 2, "maximum": 1}}}, "'maximum'"),
        (COMPLETIONS, {"structured_outputs": {"json": {"type": "string", "format": "iban"}}}, "'iban'"),
        (RESPONSES, {"text": {"format": {"type": "xml"}}}, "'text.format.type'"),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"json": {}}}, "both"),
        (MESSAGES, {"output_config": {"format": {"type": "xml"}}}, "'output_config.format.type'"),
    ],
)
async def test_what_cannot_be_followed_is_refused(start: Start, path: str, fields: JsonObject, says: str) -> None:
    _, session = await start(INSTANT)
    bodies: dict[str, JsonObject] = {
        CHAT: chat(),
        COMPLETIONS: {"prompt": "x"},
        RESPONSES: {"input": "x"},
        MESSAGES: asked(MESSAGES),
    }
    status, body = await post(session, path, bodies[path] | fields)
    assert (status, says in str(at(body, "error", "message"))) == (400, True), body


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_official_clients_parse_structured_answers(start: Start, streamed: bool) -> None:
    engine, _ = await start(INSTANT)
    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="x", max_retries=0, timeout=GUARD_S) as ai:
        if streamed:
            async with ai.chat.completions.stream(model="sim", messages=TURNS, response_format=Node) as events:
                node = (await events.get_final_completion()).choices[0].message.parsed
            async with ai.responses.stream(model="sim", input="x", text_format=Node) as parts:
                other = (await parts.get_final_response()).output_parsed
        else:
            answer = await ai.chat.completions.parse(model="sim", messages=TURNS, response_format=Node)
            node = answer.choices[0].message.parsed
            other = (await ai.responses.parse(model="sim", input="x", text_format=Node)).output_parsed
    last = Node(name="simulated", next=None, children=[])
    assert node == other == Node(name="simulated", next=last, children=[])  # the clients send the root twice


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "look_up"}])
async def test_the_anthropic_client_gets_a_tool_call_when_it_forces_one(start: Start, choice: Any) -> None:
    engine, _ = await start(INSTANT)
    tools: Any = [{"name": "look_up", "input_schema": Everything.model_json_schema()}]
    async with anthropic.AsyncAnthropic(base_url=engine.url, api_key="x", max_retries=0, timeout=GUARD_S) as ai:
        call = {"model": "sim", "max_tokens": 500, "messages": TURNS, "tools": tools, "tool_choice": choice}
        whole = await ai.messages.create(**call)
        async with ai.messages.stream(**call) as events:
            streamed = await events.get_final_message()
        plain = await ai.messages.create(**call | {"tool_choice": {"type": "auto"}})
        with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
            await ai.messages.create(**call | {"tool_choice": {"type": "tool", "name": "other"}})
    for message in (whole, streamed):
        block: Any = message.content[0]
        assert (message.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "look_up")
        TypeAdapter(Everything).validate_json(json.dumps(block.input))
    assert plain.content[0].type == "text"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look_up"}])
async def test_the_openai_client_gets_a_function_call_in_a_response(start: Start, choice: Any) -> None:
    engine, _ = await start(INSTANT)
    tools: Any = [{"type": "function", "name": "look_up", "parameters": Node.model_json_schema(), "strict": False}]
    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="x", max_retries=0, timeout=GUARD_S) as ai:
        whole = await ai.responses.create(model="sim", input="x", tools=tools, tool_choice=choice)
        async with ai.responses.stream(model="sim", input="x", tools=tools, tool_choice=choice) as events:
            streamed = await events.get_final_response()
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            await ai.responses.create(
                model="sim", input="x", tools=tools, tool_choice={"type": "function", "name": "y"}
            )
    for response in (whole, streamed):
        (item,) = response.output
        assert item.type == "function_call"
        assert item.name == "look_up"
        Node.model_validate_json(item.arguments)
