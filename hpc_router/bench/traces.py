"""Traces of arrivals: plain times, or requests in the format that Mooncake has published (arXiv 2407.00079).

A line of the plain format is `{"at_s": 1.5}`. A line of Mooncake's format is `{"timestamp": 27482, "input_length":
6955, "output_length": 52, "hash_ids": [46, 47, ...]}`: milliseconds, tokens, tokens, and one hash for each block of 512
tokens of the prompt. Two prompts have the same hash at a block if they are equal up to the end of that block.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import ConfigError
from hpc_router.state.atomic_files import lines_of

MOONCAKE_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One arrival. `hash_ids`: one hash per block of the request's prompt; None if the trace has only arrival times."""

    at_s: float
    input_length: int = 0
    output_length: int = 0
    hash_ids: Sequence[int] | None = None


def read_trace(path: Path) -> list[TracedRequest]:
    """Returns the arrivals in a trace file, in order of time. Raises ConfigError with file and line."""
    found: list[TracedRequest] = []
    for number, line in lines_of(path):
        try:
            value: Mapping[str, Any] = json.loads(line)
            one = _mooncake(value) if "hash_ids" in value else TracedRequest(float(value["at_s"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(
                f'{path}:{number}: no number at "at_s" (valid: {{"at_s": 1.5}}), and not a request with timestamp, '
                "input_length, output_length and hash_ids"
            ) from error
        if not math.isfinite(one.at_s):
            raise ConfigError(f'{path}:{number}: "at_s" is {one.at_s}, not a finite number')
        found.append(one)
    if not found or min(one.at_s for one in found) < 0:
        raise ConfigError(f"bench.trace={path}: {'no arrival' if not found else 'arrivals before 0 s'}")
    if len({one.hash_ids is None for one in found}) > 1:
        raise ConfigError(f"bench.trace={path}: some lines have hash_ids and some have not")
    return sorted(found, key=lambda one: one.at_s)


def _mooncake(value: Mapping[str, Any]) -> TracedRequest:
    length, hashes = int(value["input_length"]), tuple(int(one) for one in value["hash_ids"])
    if length < 1 or len(hashes) != -(-length // MOONCAKE_BLOCK):
        raise ValueError("one hash per block is needed")
    return TracedRequest(float(value["timestamp"]) / 1e3, length, max(1, int(value["output_length"])), hashes)


class TracedText:
    """Makes the prompts of a trace's requests: blocks with equal hashes get equal words. `block_words`: number of words
    per block of 512 tokens; a value below 512 shortens prompts and answers in proportion."""

    def __init__(self, words: Sequence[str], *, seed: str, block_words: int) -> None:
        self._words, self._seed, self._block_words = words, seed, block_words
        self._blocks: dict[int, list[str]] = {}

    def prompt(self, one: TracedRequest) -> str:
        assert one.hash_ids is not None
        words = [word for number in one.hash_ids for word in self._block(number)]
        return " ".join(words[: self._scaled(one.input_length)])

    def output_tokens(self, one: TracedRequest) -> int:
        return self._scaled(one.output_length)

    def _scaled(self, length: int) -> int:
        return max(1, round(length * self._block_words / MOONCAKE_BLOCK))

    def _block(self, number: int) -> list[str]:
        if number not in self._blocks:
            source = random.Random(f"{self._seed}:{number}")
            self._blocks[number] = source.choices(self._words, k=self._block_words)
        return self._blocks[number]
