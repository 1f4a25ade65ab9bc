"""Adds the rows of a terms x columns table for the terms of a text.

Every token maps to one Python integer that holds its whole row in fixed-point numbers: one lane of 32 or 64 bits per
column. So one `sum` of integers, in C, adds all columns of all tokens. The result is exact and does not depend on the
order of the terms or on the machine. On the request path, most of a decision's cost is loading its code and data into
the CPU caches; integers need the least of both. The row of a word includes the row of its prefix. This module must not
know what the columns mean.
"""

import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise, repeat
from operator import mul
from typing import Final

import numpy as np

from hpc_router.routing.features import SYMBOLS, Features, Floats, letter_sum, misspelt_forms

MAX_TOKENS: Final = 50_000
"""Maximum number of cached tokens outside the vocabulary. A full cache takes about 8 MB."""
MAX_TOKEN_CHARS: Final = 40
"""Maximum length of a token outside the vocabulary that is cached."""


class TermSums:
    """A table with packed rows, whose rows it adds for a text."""

    def __init__(
        self, terms: Sequence[str], table: Floats, *, features: Features, wide_lanes: bool = False, same_step: int = 0
    ) -> None:
        """Packs `table`, which has the shape terms x columns. If the terms are sorted by falling frequency, frequent
        rows share cache lines. The first `same_step` columns have the same step (see `steps`).

        With a window of 2 KiB, the rounding error of a value is at most about 2^-20 of the largest value in its column.
        With `wide_lanes` (64 bits per column) it is 2^-52, for sums whose exact value matters even close to zero.
        """
        self._features = features
        self._counts_repeats = features.kind == "cbtm"
        # NFKC can turn a window into more words than this, but not for ordinary text.
        self._max_words = features.window_bytes // 2 + 1
        words: dict[bytes | int, int] = {}
        prefixes: dict[str, int] = {}
        pairs: dict[tuple[bytes, bytes], int] = {}
        for row, term in enumerate(terms):
            first, space, second = term.partition(" ")
            if space:
                pairs[first.encode(), second.encode()] = row
            elif len(term) > 1 and term.endswith("*"):
                prefixes[term[:-1]] = row
            elif len(term) == 1 and ord(term) < 128 and ord(term) in SYMBOLS:
                words[ord(term)] = row
            else:
                words[term.encode()] = row
        table = _add_prefixes(table, words, prefixes, size=features.prefix)
        columns, lane_bytes = table.shape[1], 8 if wide_lanes else 4
        # The bias is added to each lane, so that no lane becomes negative and borrows from its neighbour.
        bias = 2 ** (8 * lane_bytes - 1)
        # The scale of a column is the largest power of two with which the longest text, if each of its terms had the
        # column's largest value, still fits the lane.
        max_terms = features.ngrams * self._max_words + len(SYMBOLS)
        largest = np.abs(table).max(axis=0, initial=2.0**-60).astype(np.float64)
        scales = np.exp2(np.floor(np.log2((bias / max_terms - 1) / largest)))
        scales[:same_step] = scales[:same_step].min(initial=np.inf)
        self.steps: list[float] = (1 / scales).tolist()
        """The value of one unit of each column in `lanes`."""
        self._unpack = struct.Struct(f"<{columns}{'q' if wide_lanes else 'i'}").unpack
        self._bytes = columns * lane_bytes
        self._bias = int.from_bytes(np.full(columns, bias, f"<u{lane_bytes}").tobytes(), "little")
        lanes = np.rint(table * scales).astype(f"<i{lane_bytes}").view(f"<u{lane_bytes}") ^ bias
        rows = [int.from_bytes(lane.tobytes(), "little") - self._bias for lane in lanes]
        vocabulary: dict[bytes | int, int] = dict.fromkeys(SYMBOLS, 0)
        vocabulary |= {word: rows[row] for word, row in words.items()}
        prefix_rows = {prefix: rows[row] for prefix, row in prefixes.items()}
        self._token_rows = _TokenRows(
            vocabulary, prefix_rows, prefix=features.prefix, corrected=features.text_version >= 3
        )
        self._row_of = self._token_rows.__getitem__
        self._pair_rows = {pair: rows[row] for pair, row in pairs.items()}

    def lanes(self, text: str) -> tuple[int, ...]:
        """Returns the sum of each column over the terms of the text, in units of its step."""
        words, symbols = self._features.split(text)
        if len(words) > self._max_words:
            words = words[: self._max_words]
        total = sum(map(self._row_of, words if self._counts_repeats else {*words, *symbols}), self._bias)
        if self._pair_rows:
            total = sum(map(self._pair_rows.get, set(pairwise(words)), repeat(0)), total)
        lanes: tuple[int, ...] = self._unpack((total ^ self._bias).to_bytes(self._bytes, "little"))
        return lanes  # biased lanes -> two's complement

    def by_term(self, text: str) -> dict[str, list[float]]:
        """Returns, for each term of the text, its contribution to each column.

        The contribution of a word includes that of its prefix. A word without a row appears as its prefix (`diabe*`),
        or as the word of which it is a misspelling; if these have none either, it is left out.
        """
        words, symbols = self._features.split(text)
        words = words[: self._max_words]
        contributions: dict[str, int] = {}
        for token in words if self._counts_repeats else dict.fromkeys((*words, *symbols)):
            value = self._token_rows[token]
            if value:
                name = self._token_rows.term_of(token)
                contributions[name] = contributions.get(name, 0) + value
        for pair in dict.fromkeys(pairwise(words)) if self._pair_rows else ():
            if pair in self._pair_rows:
                contributions[b" ".join(pair).decode()] = self._pair_rows[pair]
        return {name: self._columns(self._bias + value) for name, value in contributions.items()}

    def _columns(self, total: int) -> list[float]:
        lanes = (total ^ self._bias).to_bytes(self._bytes, "little")  # biased lanes -> two's complement
        return [*map(mul, self._unpack(lanes), self.steps)]


class _TokenRows(dict[bytes | int, int]):
    """Maps a token to its packed row: the row of the word or symbol; else that of its prefix; else, if `corrected`,
    that of the word of which it is a misspelling; else 0. The result of every look-up is kept."""

    def __init__(
        self, known: Mapping[bytes | int, int], prefix_rows: Mapping[str, int], *, prefix: int, corrected: bool
    ) -> None:
        super().__init__(known)
        self._known = known
        self._prefix_rows = prefix_rows
        self._prefix = prefix
        self._corrected = corrected
        self._known_letters = {letter_sum(word) for word in known if isinstance(word, bytes)} if corrected else set()
        self._max_size = len(known) + MAX_TOKENS

    def __missing__(self, token: bytes) -> int:
        value = self._resolved(token)[1]
        if len(token) <= MAX_TOKEN_CHARS:
            if len(self) >= self._max_size:
                self.clear()
                self.update(self._known)
            self[token] = value
        return value

    def term_of(self, token: bytes | int) -> str:
        """Returns the term whose row is used for the token."""
        if isinstance(token, int):
            return chr(token)
        return token.decode() if token in self._known else self._resolved(token)[0]

    def _resolved(self, token: bytes) -> tuple[str, int]:
        """Returns the term that stands for a token outside the vocabulary, and its row. A row of 0 means that no term
        does."""
        # The slice of a token shorter than the prefix length is the token itself, which is not in `_prefix_rows`.
        name = token.decode()[: self._prefix]
        row = self._prefix_rows.get(name)
        if row is None and self._corrected:
            known = self._known
            for form in misspelt_forms(token, known_letters=self._known_letters):
                if form in known:
                    return form.decode(), known[form]
        return f"{name}*", row or 0


def _add_prefixes(table: Floats, words: Mapping[bytes | int, int], prefixes: Mapping[str, int], *, size: int) -> Floats:
    """Returns the table with the row of each word's prefix, its first `size` characters, added to the word's own row.
    `words`, `prefixes`: row numbers."""
    pairs = [
        (row, prefixes[prefix])
        for word, row in words.items()
        if isinstance(word, bytes) and (prefix := word.decode()[:size]) in prefixes
    ]
    if not pairs:
        return table
    word_rows, prefix_rows = np.array(pairs).T
    added = table.copy()
    added[word_rows] += table[prefix_rows]
    return added
