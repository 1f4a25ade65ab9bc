"""What the simulated model says: deterministic from (seed, model, prompt), decided before the first token is paced.

A token is a word with the space before it, in prompts and in answers, so usage can be recounted by `str.split`.
A request that gives no limit ends by itself (`stop`) after the engine's default; one that gives `max_tokens` gets
exactly that many (`length`), so load tests control lengths. Knows neither HTTP nor time.
"""

import hashlib
import json
import random
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

# 61 words: a prime, so every stride visits them all before it repeats.
_VOCABULARY = """
the of and to in a is that for it as with on by be this are from at or an which not but have one can all more if when
so no than each other into only time its two first then now some where most over such these may new way well number
set part point line order form
"""
_WORDS = tuple(f" {word}" for word in _VOCABULARY.split())


def count_tokens(text: str) -> int:
    return len(text.split())


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice. `tokens` may exceed `len(pieces)`: tokens swallowed by a stop string were generated, not sent."""

    pieces: tuple[str, ...]
    tokens: int
    finish_reason: str
    stop_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def aborted(self, tokens: int) -> "Completion":
        """As the engine ends it when it stops after so many tokens; whole where that is all of it."""
        if tokens >= self.tokens:
            return self
        return Completion(pieces=self.pieces[:tokens], tokens=tokens, finish_reason="abort")


def complete_text(
    prompt: str, *, model: str, seed: str, limit: int | None, default: int, stop: tuple[str, ...] = ()
) -> Completion:
    """`limit` is the request's max_tokens, `default` the length of an answer that ends by itself."""
    pieces = _speak(prompt, model=model, seed=seed, count=default if limit is None else limit)
    stopped = _cut_at_stop(pieces, stop=stop)
    if stopped is not None:
        return stopped
    return Completion(pieces=pieces, tokens=len(pieces), finish_reason="stop" if limit is None else "length")


def complete_tool_call(parameters: object, *, limit: int | None) -> Completion:
    """The arguments of a forced tool call: the smallest plausible object its JSON schema allows, as JSON text."""
    text = json.dumps(_example(parameters) if isinstance(parameters, dict) else {})
    pieces = tuple(re.findall(r"\S+\s*", text))
    if limit is not None and limit < len(pieces):
        return Completion(pieces=pieces[:limit], tokens=limit, finish_reason="length")
    return Completion(pieces=pieces, tokens=len(pieces), finish_reason="tool_calls")


def unit_vector(text: str, *, model: str, seed: int, dimensions: int) -> tuple[float, ...]:
    """A direction fixed by the text, rounded to float32 so that both encodings carry the same numbers."""
    rng = random.Random(_number(seed, model, text))
    raw = [rng.gauss(0.0, 1.0) for _ in range(dimensions)]
    length = sum(value * value for value in raw) ** 0.5
    layout = f"<{dimensions}f"
    return struct.unpack(layout, struct.pack(layout, *(value / length for value in raw)))


def json_bytes(piece: str) -> bytes:
    """A piece as a JSON string; the vocabulary is small, so nearly every token is a look-up."""
    return _short_json_bytes(piece) if len(piece) <= 64 else json.dumps(piece).encode()


@lru_cache(maxsize=4096)
def _short_json_bytes(piece: str) -> bytes:
    return json.dumps(piece).encode()


def _number(*parts: object) -> int:
    # surrogatepass: JSON may escape lone surrogates, and they must not break the engine.
    joined = "\x00".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def _speak(prompt: str, *, model: str, seed: str, count: int) -> tuple[str, ...]:
    number = _number(seed, model, prompt)
    stride = 1 + number % (len(_WORDS) - 1)
    start = number // len(_WORDS) % len(_WORDS)
    opening = ("-".join(model.split()), " simulated", " answer")
    body = (_WORDS[(start + stride * index) % len(_WORDS)] for index in range(count))
    return (*opening[:count], *islice(body, max(0, count - len(opening))))


def _cut_at_stop(pieces: tuple[str, ...], *, stop: tuple[str, ...]) -> Completion | None:
    """Generation ends with the token that completes a stop string; the string itself is not part of the answer."""
    text = "".join(pieces)
    found = [(text.find(string) + len(string), text.find(string), string) for string in stop if string in text]
    if not found:
        return None
    end, start, string = min(found)
    kept: list[str] = []
    position = tokens = 0
    for piece in pieces:
        if position >= end:
            break
        tokens += 1
        if position < start:
            kept.append(piece[: start - position])
        position += len(piece)
    return Completion(pieces=tuple(kept), tokens=tokens, finish_reason="stop", stop_reason=string)


def _example(schema: object) -> object:
    if not isinstance(schema, dict):
        return "simulated"
    choices = schema.get("enum")
    if isinstance(choices, list) and choices:
        return choices[0]
    match schema.get("type"):
        case "integer" | "number":
            return 0
        case "boolean":
            return True
        case "array":
            return []
        case "null":
            return None
        case "object":
            fields = schema.get("properties")
            return {name: _example(field) for name, field in fields.items()} if isinstance(fields, dict) else {}
        case _:
            return "simulated"
