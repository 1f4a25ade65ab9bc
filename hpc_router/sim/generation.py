"""What a request asks for, in the terms of every API: the result of parsing and the input of the simulation."""

from dataclasses import dataclass
from enum import StrEnum


class Api(StrEnum):
    CHAT = "chat.completion"
    TEXT = "text_completion"
    RESPONSE = "response"
    MESSAGE = "message"


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """`echo` is the text that the answer repeats; `token_text` the text whose words are the tokens, where that is not
    `text` (a chat prompt contains its roles, which are not counted)."""

    text: str
    tokens: int
    echo: str = ""
    token_text: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    parameters: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request for text; it has one choice per prompt and `n`.

    `limit_name` is the field that set `max_tokens`. `literal` is the text of the answer if the request fixes it: JSON
    for a schema, or the arguments of `tool`, which is set if a tool call is forced. `top_logprobs` and
    `prompt_logprobs` are numbers of alternatives, None if no log probabilities are requested. `previous_response_id` is
    the response that this one continues; `store` says whether this one can be continued too.
    """

    api: Api
    model: str | None
    prompts: tuple[ParsedPrompt, ...]
    n: int = 1
    max_tokens: int | None = None
    limit_name: str = "max_tokens"
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    seed: int = 0
    stream: bool = False
    include_usage: bool = False
    tool: Tool | None = None
    literal: str | None = None
    echo: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    previous_response_id: str | None = None
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
