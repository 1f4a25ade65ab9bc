"""`/tokenize` and `/detokenize`, with the same token ids as in log probabilities.

An id is computed from its token, but the token cannot be computed from its id. The tokenizer therefore remembers the
tokens of the ids that it has returned, up to a limit. An id that it does not know becomes a text with that number, as
in prompts of token ids.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from hpc_router.sim.api_error import ApiError
from hpc_router.sim.logprobs import token_id
from hpc_router.sim.prompt_parsing import chat_prompt, messages
from hpc_router.sim.request_fields import RequestFields
from hpc_router.sim.response_formats import encode
from hpc_router.sim.tokens import split_tokens

MAX_TOKENS: Final = 65_536


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A parsed request for `/tokenize`."""

    model: str | None
    text: str
    with_texts: bool


def parse_tokenize(raw: bytes) -> TokenizeRequest:
    fields = RequestFields(raw)
    text = fields.text("prompt")
    if text is None:
        if fields.value("messages") is None:
            raise ApiError("'prompt' or 'messages' is required.", param="prompt")
        text = chat_prompt(messages(fields.value("messages"))).token_text or ""
    return TokenizeRequest(fields.text("model"), text, fields.flag("return_token_strs"))


def parse_detokenize(raw: bytes) -> tuple[str | None, list[int]]:
    """Parses a request for `/detokenize`. Returns the model and the token ids."""
    fields = RequestFields(raw)
    tokens = fields.value("tokens")
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise ApiError("'tokens' must be a list of token ids.", param="tokens")
    return fields.text("model"), tokens


@dataclass(slots=True)
class Tokenizer:
    """The tokenizer of one engine."""

    max_tokens: int = MAX_TOKENS
    _known: OrderedDict[int, str] = field(default_factory=OrderedDict)

    def tokenize_body(self, asked: TokenizeRequest, *, max_model_len: int) -> bytes:
        pieces = split_tokens(asked.text) if asked.text.strip() else []
        tokens = [self._number(piece) for piece in pieces]
        texts = pieces if asked.with_texts else None
        return encode(
            {
                "count": len(tokens),
                "max_model_len": max_model_len,
                "tokens": tokens,
                "token_strs": texts,
                "simulated": True,
            }
        )

    def detokenize_body(self, tokens: list[int]) -> bytes:
        return encode(
            {"prompt": "".join(self._known.get(token, f" {token}") for token in tokens).strip(), "simulated": True}
        )

    def _number(self, piece: str) -> int:
        number = token_id(piece)
        self._known[number] = piece
        if len(self._known) > self.max_tokens:
            self._known.popitem(last=False)
        return number
