"""The forms of a parsed request, the same for every API. Parsing returns them, and the simulation gets them."""

from dataclasses import dataclass
from enum import StrEnum


class Api(StrEnum):
    """The API of a request, which decides the format of its response."""

    CHAT = "chat.completion"
    TEXT = "text_completion"
    RESPONSE = "response"
    MESSAGE = "message"


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """A prompt. `echo`: text that the answer repeats. `token_text`: text whose words are the tokens, if it differs from
    `text` (a chat prompt contains role names, which are not counted)."""

    text: str
    tokens: int
    echo: str = ""
    token_text: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the request offers, with the JSON schema of its arguments."""

    name: str
    parameters: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request for text. It gets `n` choices for each prompt.

    `limit_name`: name of the field that set `max_tokens`. `literal`: the answer's text if the request determines it:
    JSON for a schema, or the arguments of the forced `tool`. `top_logprobs`, `prompt_logprobs`: number of alternatives
    per token, None if no log probabilities are requested. `previous_response_id`: id of the response that this one
    continues. `store`: whether a later request can continue this response. `cache_salt`: requests with different values
    share no cached prefixes. `priority`: the lowest value is served first if the engine orders requests by it.
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
    cache_salt: str | None = None
    priority: int = 0
    fault: object = None

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """One request for embeddings."""

    model: str | None
    inputs: tuple[ParsedPrompt, ...]
    base64: bool = False
    dimensions: int | None = None
    priority: int = 0
    fault: object = None

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.inputs)
