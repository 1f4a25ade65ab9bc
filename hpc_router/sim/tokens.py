"""The text of the simulated answers. Seed, model and prompt determine it before the first token is due.

A token is a word with the space before it, in prompts and in answers, so `str.split` gives the same counts as the
usage. An answer ends after a number of tokens that the prompt determines, or earlier at its limit. With `ignore_eos` it
has exactly its maximum length, so that load tests control lengths. This module knows neither HTTP nor time.
"""

import hashlib
import json
import random
import re
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

# There are 61 words. 61 is a prime, so every stride visits all words before it repeats.
_VOCABULARY = """
the of and to in a is that for it as with on by be this are from at or an which not but have one can all more if when
so no than each other into only time its two first then now some where most over such these may new way well number
set part point line order form
"""
WORDS = tuple(f" {word}" for word in _VOCABULARY.split())


def count_tokens(text: str) -> int:
    return len(text.split())


def split_tokens(text: str) -> list[str]:
    """Splits a text into tokens, one per word. The concatenation of the tokens is the text."""
    return re.findall(r"\s*\S+(?:\s+\Z)?", text) or [text]


@dataclass(frozen=True, slots=True)
class Completion:
    """The text of one choice. `pieces`: its parts as they are sent, one per token. `generated`: the parts of all
    computed tokens, before a stop string was cut off. `tokens`: number of computed tokens, which can be greater than
    `len(pieces)`."""

    pieces: tuple[str, ...]
    tokens: int
    finish_reason: str
    stop_reason: str | None = None
    generated: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def aborted(self, tokens: int) -> "Completion":
        """Returns the completion cut after `tokens` tokens, because the engine has stopped."""
        if tokens >= self.tokens:
            return self
        return replace(
            self,
            pieces=self.pieces[:tokens],
            tokens=tokens,
            finish_reason="abort",
            stop_reason=None,
            generated=self.generated[:tokens],
        )


def complete_text(
    prompt: str,
    *,
    model: str,
    seed: str,
    limit: int,
    mean_tokens: int,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    stop: tuple[str, ...] = (),
) -> Completion:
    """Returns an answer of 0.5 to 1.5 times `mean_tokens` tokens, or `min_tokens` if that is more, cut at `limit`
    tokens. With `ignore_eos`, it has exactly `limit` tokens. One of the strings `stop` ends it earlier."""
    number = seeded_number(seed, model, prompt)
    half = mean_tokens // 2
    natural = mean_tokens - half + (number >> 32) % (2 * half + 1)
    length = limit if ignore_eos else min(limit, max(natural, min_tokens))
    pieces = _words(number, model=model, count=length)
    stopped = _cut_at_stop(pieces, stop=stop)
    if stopped is not None:
        return stopped
    at_limit = ignore_eos or natural > limit
    return Completion(pieces, length, "length" if at_limit else "stop", generated=pieces)


def complete_literal(text: str, *, limit: int, finish_reason: str) -> Completion:
    """Returns an answer that has the given text, cut after `limit` tokens."""
    pieces = tuple(split_tokens(text))[:limit]
    whole = len("".join(pieces)) == len(text)
    return Completion(pieces, len(pieces), finish_reason if whole else "length", generated=pieces)


def unit_vector(text: str, *, model: str, seed: int, dimensions: int) -> tuple[float, ...]:
    """Returns a unit vector that the text determines. The values are rounded to float32, so that the response has the
    same numbers as JSON and in base64."""
    rng = random.Random(seeded_number(seed, model, text))
    raw = [rng.gauss(0.0, 1.0) for _ in range(dimensions)]
    length = sum(value * value for value in raw) ** 0.5
    layout = f"<{dimensions}f"
    return struct.unpack(layout, struct.pack(layout, *(value / length for value in raw)))


def json_bytes(piece: str) -> bytes:
    """Returns a piece of text as a JSON string. Results are cached, because the vocabulary is small."""
    return _short_json_bytes(piece) if len(piece) <= 64 else json.dumps(piece).encode()


@lru_cache(maxsize=4096)
def _short_json_bytes(piece: str) -> bytes:
    return json.dumps(piece).encode()


def seeded_number(*parts: object) -> int:
    # surrogatepass, because JSON may contain escaped lone surrogates, which must not cause an error.
    joined = "\x00".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def _words(number: int, *, model: str, count: int) -> tuple[str, ...]:
    stride = 1 + number % (len(WORDS) - 1)
    start = number // len(WORDS) % len(WORDS)
    opening = ("-".join(model.split()), " simulated", " answer")
    body = (WORDS[(start + stride * index) % len(WORDS)] for index in range(count))
    return (*opening[:count], *islice(body, max(0, count - len(opening))))


def _cut_at_stop(pieces: tuple[str, ...], *, stop: tuple[str, ...]) -> Completion | None:
    """Returns the completion cut before the first stop string; None if there is none. Generation ends with the token
    that completes the stop string."""
    text = "".join(pieces)
    matches = [(text.find(string) + len(string), text.find(string), string) for string in stop if string in text]
    if not matches:
        return None
    end, start, string = min(matches)
    sent: list[str] = []
    position = tokens = 0
    for piece in pieces:
        if position >= end:
            break
        tokens += 1
        if position < start:
            sent.append(piece[: start - position])
        position += len(piece)
    return Completion(tuple(sent), tokens, "stop", string, pieces[:tokens])
