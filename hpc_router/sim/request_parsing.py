"""What a request asks for: OpenAI and Anthropic request bodies checked and reduced to what the simulation needs.

Errors are vLLM's: status, `type` and `code` as its server sends them, the message naming the key. Unknown fields are
accepted and ignored, as vLLM does. Nothing here knows the engine's state or the answer.
"""

import json
from dataclasses import dataclass
from enum import StrEnum

from hpc_router.sim.api_error import ApiError
from hpc_router.sim.tokens import count_tokens

MAX_CHOICES = 128


class Api(StrEnum):
    CHAT = "chat.completion"
    TEXT = "text_completion"
    RESPONSE = "response"
    MESSAGE = "message"


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    parameters: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What is to be said; one choice per prompt and `n`. `tool` is set where a tool call is forced.

    `previous`: the response that this one continues; `store`: whether it may be continued in turn."""

    api: Api
    model: str | None
    prompts: tuple[ParsedPrompt, ...]
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    stream: bool = False
    include_usage: bool = False
    tool: Tool | None = None
    previous: str | None = None
    store: bool = False
    fault: object = None

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    model: str | None
    inputs: tuple[ParsedPrompt, ...]
    base64: bool = False
    dimensions: int | None = None
    fault: object = None

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.inputs)


class Fields:
    """Typed reads from a JSON body; null counts as absent."""

    def __init__(self, raw: bytes) -> None:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as exc:
            raise ApiError(f"The body is not valid JSON: {exc}") from exc
        if not isinstance(body, dict):
            raise ApiError("The body must be a JSON object.")
        self._body: dict[str, object] = body

    def any(self, key: str) -> object:
        return self._body.get(key)

    def text(self, key: str) -> str | None:
        value = self._body.get(key)
        if value is not None and not isinstance(value, str):
            raise ApiError(f"'{key}' must be a string.", param=key)
        return value

    def flag(self, key: str) -> bool:
        value = self._body.get(key)
        if value is not None and not isinstance(value, bool):
            raise ApiError(f"'{key}' must be true or false.", param=key)
        return bool(value)

    def whole(self, key: str, *, least: int, most: int | None = None) -> int | None:
        value = self._body.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ApiError(f"'{key}' must be an integer.", param=key)
        if value < least or (most is not None and value > most):
            raise ApiError(f"'{key}' must be at least {least}{f' and at most {most}' if most else ''}.", param=key)
        return value


def parse_chat(raw: bytes) -> Generation:
    fields = Fields(raw)
    stream = fields.flag("stream")
    limit = fields.whole("max_completion_tokens", least=1)
    return Generation(
        api=Api.CHAT,
        model=fields.text("model"),
        prompts=(_prompt(_messages(fields.any("messages"))),),
        n=fields.whole("n", least=1, most=MAX_CHOICES) or 1,
        max_tokens=fields.whole("max_tokens", least=1) if limit is None else limit,
        stop=_stop(fields.any("stop")),
        seed=fields.whole("seed", least=-(2**63)) or 0,
        stream=stream,
        include_usage=_include_usage(fields.any("stream_options"), stream=stream),
        tool=_forced_tool(fields.any("tools"), fields.any("tool_choice")),
        fault=fields.any("sim_fault"),
    )


def parse_completion(raw: bytes) -> Generation:
    fields = Fields(raw)
    stream = fields.flag("stream")
    prompts = _inputs(fields.any("prompt"), key="prompt")
    return Generation(
        api=Api.TEXT,
        model=fields.text("model"),
        prompts=prompts,
        n=fields.whole("n", least=1, most=max(1, MAX_CHOICES // len(prompts))) or 1,
        max_tokens=fields.whole("max_tokens", least=1),
        stop=_stop(fields.any("stop")),
        seed=fields.whole("seed", least=-(2**63)) or 0,
        stream=stream,
        include_usage=_include_usage(fields.any("stream_options"), stream=stream),
        fault=fields.any("sim_fault"),
    )


def parse_response(raw: bytes) -> Generation:
    fields = Fields(raw)
    instructions = fields.text("instructions")
    spoken = [] if instructions is None else [("system", instructions)]
    return Generation(
        api=Api.RESPONSE,
        model=fields.text("model"),
        prompts=(_prompt(spoken + _items(fields.any("input"))),),
        max_tokens=fields.whole("max_output_tokens", least=1),
        stream=fields.flag("stream"),
        previous=fields.text("previous_response_id"),
        store=fields.any("store") is None or fields.flag("store"),
        fault=fields.any("sim_fault"),
    )


def parse_message(raw: bytes) -> Generation:
    fields = Fields(raw)
    system = fields.any("system")
    spoken = [] if system is None else [_message({"role": "system", "content": system}, where="system")]
    limit = fields.whole("max_tokens", least=1)
    if limit is None:
        raise ApiError("'max_tokens' is required.", param="max_tokens")
    return Generation(
        api=Api.MESSAGE,
        model=fields.text("model"),
        prompts=(_prompt(spoken + _messages(fields.any("messages"))),),
        max_tokens=limit,
        stop=_stop(fields.any("stop_sequences")),
        stream=fields.flag("stream"),
        fault=fields.any("sim_fault"),
    )


def parse_embedding(raw: bytes) -> Embedding:
    fields = Fields(raw)
    encoding = fields.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise ApiError("'encoding_format' must be 'float' or 'base64'.", param="encoding_format")
    return Embedding(
        model=fields.text("model"),
        inputs=_inputs(fields.any("input"), key="input"),
        base64=encoding == "base64",
        dimensions=fields.whole("dimensions", least=1, most=65_536),
        fault=fields.any("sim_fault"),
    )


def check_length(prompt: ParsedPrompt, *, max_tokens: int | None, max_model_len: int) -> None:
    """vLLM's refusal of what does not fit; one output token must always have room."""
    asked = 1 if max_tokens is None else max_tokens
    if prompt.tokens + asked > max_model_len:
        raise ApiError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {asked} output "
            f"tokens and your prompt contains {prompt.tokens} input tokens, for a total of {prompt.tokens + asked} "
            "tokens. Please reduce the length of the input prompt or the number of requested output tokens.",
            param="input_tokens",
        )


def _prompt(spoken: list[tuple[str, str]]) -> ParsedPrompt:
    tokens = sum(count_tokens(content) for _, content in spoken)
    return ParsedPrompt(text="\n".join(f"{role}: {content}" for role, content in spoken), tokens=max(1, tokens))


def _messages(messages: object) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ApiError("'messages' must be a non-empty list of messages.", param="messages")
    return [_message(message, where=f"messages[{index}]") for index, message in enumerate(messages)]


def _items(value: object) -> list[tuple[str, str]]:
    """The input of a response; of its items only messages are said to the model."""
    if isinstance(value, str):
        return [("user", value)]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ApiError("'input' must be a string or a non-empty list of items.", param="input")
    spoken = enumerate(value)
    return [_message(item, where=f"input[{i}]") for i, item in spoken if item.get("type", "message") == "message"]


def _message(message: object, *, where: str) -> tuple[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(f"'{where}' must be an object with a 'role'.", param=where)
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message["role"], content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ApiError(f"'{where}.content' must be a string or a list of parts.", param=f"{where}.content")
    texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
    return message["role"], "\n".join(texts)


def _inputs(value: object, *, key: str) -> tuple[ParsedPrompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    if isinstance(value, str):
        return (ParsedPrompt(text=value, tokens=max(1, count_tokens(value))),)
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            return (ParsedPrompt(text=" ".join(map(str, value)), tokens=len(value)),)
        if all(isinstance(item, str) or _is_token_ids(item) for item in value):
            return tuple(prompt for item in value for prompt in _inputs(item, key=key))
    raise ApiError(f"'{key}' must be a string, a list of strings or a list of token ids, and not empty.", param=key)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, int) for item in value)


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        raise ApiError("'stop' must be a string or a list of strings, none of them empty.", param="stop")
    return tuple(strings)


def _include_usage(value: object, *, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise ApiError("Stream options can only be defined when `stream=True`.", param="stream_options")
    if not isinstance(value, dict):
        raise ApiError("'stream_options' must be an object.", param="stream_options")
    return bool(value.get("include_usage"))


def _forced_tool(tools: object, choice: object) -> Tool | None:
    offered: list[Tool] = []
    for index, entry in enumerate(tools if isinstance(tools, list) else []):
        function = entry.get("function") if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"'tools[{index}]' must be an object with a 'function' that has a 'name'.", param="tools")
        offered.append(Tool(name=function["name"], parameters=function.get("parameters")))
    if tools is not None and not isinstance(tools, list):
        raise ApiError("'tools' must be a list.", param="tools")
    if choice in (None, "none", "auto"):
        return None
    if not offered:
        raise ApiError("When using `tool_choice`, `tools` must be set.", param="tool_choice")
    if choice == "required":
        return offered[0]
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    for tool in offered:
        if tool.name == name:
            return tool
    raise ApiError("'tool_choice' must be 'none', 'auto', 'required' or name one of the `tools`.", param="tool_choice")
