"""Log probabilities of the simulated tokens, in vLLM's formats.

Every token is the most probable one at its place. Its position and text determine its probability, between 0.5 and 0.9;
words of the vocabulary share the rest. The formats are those of CompletionLogProbs and `_create_completion_logprobs`
(vllm/entrypoints/openai/completion), ChatCompletionLogProbs (.../chat_completion/protocol.py) and Logprob
(vllm/logprobs.py). As in vLLM, the token is one of the alternatives, and the first prompt token has none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hpc_router.sim.tokens import WORDS, seeded_number, split_tokens

MAX_LOGPROBS: Final = 20
"""Maximum number of alternatives: vLLM's default of `--max-logprobs` (vllm/config/model.py)."""
VOCABULARY_SIZE: Final = len(WORDS)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token with the log probabilities of itself and its alternatives. The first token of a prompt has none."""

    token: str
    values: tuple[tuple[str, float], ...] = ()


def token_logprobs(tokens: Sequence[str], *, seed: str, count: int, position: int = 0) -> list[TokenLogprobs]:
    """Returns the log probabilities of each token. `position`: place of the first token in its context. `count`: number
    of entries per token, at least 1."""
    return [_token_logprobs(token, f"{seed}/{position + k}", max(1, count)) for k, token in enumerate(tokens)]


def prompt_logprobs(text: str, *, seed: str, count: int) -> list[TokenLogprobs]:
    """Returns the log probabilities of the tokens of a prompt; none for its first token."""
    first, *rest = split_tokens(text)
    return [TokenLogprobs(first), *token_logprobs(rest, seed=seed, count=count, position=1)]


def _token_logprobs(token: str, seed: str, count: int) -> TokenLogprobs:
    number = seeded_number(seed, token)
    probability = 0.5 + 0.4 * (number % 10_000) / 10_000
    values = [(token, math.log(probability))]
    for step in range(VOCABULARY_SIZE):
        if len(values) == count:
            break
        other = WORDS[(number + step) % VOCABULARY_SIZE]
        if other != token and token_id(other) != token_id(token):
            values.append((other, math.log((1 - probability) * 0.5 ** len(values))))
    return TokenLogprobs(token, tuple(values))


def token_id(token: str) -> int:
    """Returns the id of a token: of a number, the number itself; of a word of the vocabulary, its place there; of any
    other text, a hash that is larger than every such place."""
    word = token.strip()
    if word.isascii() and word.isdecimal():
        return int(word)
    return WORDS.index(token) if token in WORDS else VOCABULARY_SIZE + seeded_number("id", token) % 2**17


def completion_logprobs(entries: Sequence[TokenLogprobs], *, offset: int = 0) -> dict[str, object]:
    """Returns the log probabilities in the format of a text completion. `offset`: characters of the text before the
    first token."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "text_offset": offsets,
        "token_logprobs": [entry.values[0][1] if entry.values else None for entry in entries],
        "tokens": [entry.token for entry in entries],
        "top_logprobs": [dict(entry.values) or None for entry in entries],
    }


def chat_logprobs(entries: Sequence[TokenLogprobs], *, top: int) -> list[dict[str, object]]:
    """Returns the log probabilities in the format of a chat response's `logprobs.content`, with `top` alternatives per
    token. /v1/responses has the same list."""
    return [
        {**_chat_entry(*entry.values[0]), "top_logprobs": [_chat_entry(*value) for value in entry.values[:top]]}
        for entry in entries
    ]


def _chat_entry(token: str, logprob: float) -> dict[str, object]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}


def prompt_logprobs_json(entries: Sequence[TokenLogprobs]) -> list[dict[str, object] | None]:
    """Returns the log probabilities of a prompt as JSON values, one object per token: token id -> log probability,
    rank, text."""
    return [
        {
            str(token_id(token)): {"logprob": logprob, "rank": rank, "decoded_token": token}
            for rank, (token, logprob) in enumerate(entry.values, start=1)
        }
        or None
        for entry in entries
    ]
