"""What the terms of a text add up to: the columns of a table, summed over its rows.

A token is one integer: each column's value in fixed point, a lane of 32 or 64 bits for each. To add all columns of all
tokens is then one `sum` of integers, in C, and exact: in whatever order, on whatever machine, the result is the same.
What a decision costs beside a relay is how much code and data it draws into the caches, and this is the least. A
token's rows (its word's and its beginning's) were added up when the table was loaded.
"""

import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise, repeat
from operator import mul
from typing import Final

import numpy as np

from hpc_router.routing.features import SYMBOLS, Features, Floats

MAX_TOKENS: Final = 50_000
MAX_TOKEN_CHARS: Final = 40
"""Of those that are no word of the vocabulary and are kept with their integers: some 8 MB, whatever is asked."""


class TermSums:
    def __init__(self, terms: Sequence[str], table: Floats, *, features: Features, fine: bool = False) -> None:
        """`table`: terms x columns. The commonest terms first: then what most prompts touch lies close together.

        With a window of 2 KiB a value is off by some 2^-20 of its column's largest at most; with `fine` by 2^-52, in
        lanes twice as wide: where a sum may be next to nothing and counts all the same.
        """
        self._features = features
        self._repeats = features.kind == "cbtm"
        # Of words; normalising can make more of a window than it had, but not of what people write.
        self._most = features.window_bytes // 2 + 1
        words: dict[bytes | int, int] = {}
        prefixes: dict[str, int] = {}
        pairs: dict[tuple[bytes, bytes], int] = {}
        for number, term in enumerate(terms):
            first, space, second = term.partition(" ")
            if space:
                pairs[first.encode(), second.encode()] = number
            elif len(term) > 1 and term.endswith("*"):
                prefixes[term[:-1]] = number
            elif len(term) == 1 and ord(term) < 128 and ord(term) in SYMBOLS:
                words[ord(term)] = number
            else:
                words[term.encode()] = number
        joined = _joined(table, words, prefixes, size=features.prefix)
        columns, size = table.shape[1], 8 if fine else 4
        half = 2 ** (8 * size - 1)  # added to each lane, so that none is ever below zero and takes from its neighbour
        # As many terms as a text can have, each with a column's largest value, still fit its lane.
        most = features.ngrams * self._most + len(SYMBOLS)
        largest = np.abs(joined).max(axis=0, initial=2.0**-60).astype(np.float64)
        scales = np.exp2(np.floor(np.log2((half / most - 1) / largest)))
        self._steps: list[float] = (1 / scales).tolist()
        self._unpack = struct.Struct(f"<{columns}{'q' if fine else 'i'}").unpack
        self._bytes = columns * size
        self._zero = int.from_bytes(np.full(columns, half, f"<u{size}").tobytes(), "little")
        lanes = np.rint(joined * scales).astype(f"<i{size}").view(f"<u{size}") ^ half
        rows = [int.from_bytes(lane.tobytes(), "little") - self._zero for lane in lanes]
        known: dict[bytes | int, int] = dict.fromkeys(SYMBOLS, 0)
        known |= {word: rows[number] for word, number in words.items()}
        beginnings = {prefix: rows[number] for prefix, number in prefixes.items()}
        self._words = _Words(known, beginnings, prefix=features.prefix)
        self._pairs = {pair: rows[number] for pair, number in pairs.items()}

    def of(self, text: str) -> list[float]:
        """By column."""
        words, symbols = self._features.split(text)
        if len(words) > self._most:
            words = words[: self._most]
        total = sum(map(self._words.__getitem__, words if self._repeats else {*words, *symbols}), self._zero)
        if self._pairs:
            total = sum(map(self._pairs.get, set(pairwise(words)), repeat(0)), total)
        return self._columns(total)

    def by_term(self, text: str) -> dict[str, list[float]]:
        """The same, term by term: a word brings its beginning's part along; one that is not known has its beginning's
        (`diabe*`) or none and is left out."""
        words, symbols = self._features.split(text)
        words = words[: self._most]
        found: dict[str, int] = {}
        for token in words if self._repeats else dict.fromkeys((*words, *symbols)):
            value = self._words[token]
            if value:
                name = self._words.name(token)
                found[name] = found.get(name, 0) + value
        for pair in dict.fromkeys(pairwise(words)) if self._pairs else ():
            if pair in self._pairs:
                found[b" ".join(pair).decode()] = self._pairs[pair]
        return {name: self._columns(self._zero + value) for name, value in found.items()}

    def _columns(self, total: int) -> list[float]:
        lanes = (total ^ self._zero).to_bytes(self._bytes, "little")  # what is above the half, in two's complement
        return [*map(mul, self._unpack(lanes), self._steps)]


class _Words(dict[bytes | int, int]):
    """Token -> its integer: of the word or ASCII symbol, else of its beginning, else 0. What has once been looked up is
    kept."""

    def __init__(self, words: Mapping[bytes | int, int], prefixes: Mapping[str, int], *, prefix: int) -> None:
        super().__init__(words)
        self._known = words
        self._prefixes = prefixes
        self._prefix = prefix
        self._most = len(words) + MAX_TOKENS

    def __missing__(self, token: bytes) -> int:
        # A token shorter than the prefix is its own slice, and no prefix is that short, so it finds nothing.
        value = self._prefixes.get(token.decode()[: self._prefix], 0)
        if len(token) <= MAX_TOKEN_CHARS:
            if len(self) >= self._most:
                self.clear()
                self.update(self._known)
            self[token] = value
        return value

    def name(self, token: bytes | int) -> str:
        """Of the term that speaks for it."""
        if isinstance(token, int):
            return chr(token)
        return token.decode() if token in self._known else f"{token.decode()[: self._prefix]}*"


def _joined(table: Floats, words: Mapping[bytes | int, int], prefixes: Mapping[str, int], *, size: int) -> Floats:
    """The table with the row of a word's beginning added to the word's."""
    both = [
        (row, prefixes[beginning])
        for word, row in words.items()
        if isinstance(word, bytes) and (beginning := word.decode()[:size]) in prefixes
    ]
    if not both:
        return table
    rows, beginnings = np.array(both).T
    joined = table.copy()
    joined[rows] += table[beginnings]
    return joined
