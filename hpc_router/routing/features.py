"""Text -> terms -> the row of a TF-IDF matrix, the same for training and for a decision.

A token is a lower-cased word, number or single symbol: digits, one-letter words and operators stay, because maths and
code are made of them; scripts written without spaces give one token per character. A term is a token, `a b` (two
tokens in a row) or `diabe*` (a longer token's beginning); no token holds a space or mixes letters with `*`, so one
string names each. The hot path is C loops (replace, split, dict lookups, Counter): no bytecode runs for a token
that has been met before. This module knows nothing of weights, clusters or experts.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

WINDOW_BYTES = 2048

MOST_TOKENS = 50_000
LONGEST_TOKEN = 40
"""Of those whose rows are kept: some 8 MB, whatever is asked."""

Ids = NDArray[np.intp]
Floats = NDArray[np.float32]

# 1 + ln(count), by count. A window holds no more terms than this has places, unless it was made larger.
_SUBLINEAR: Floats = np.concatenate(([0], 1 + np.log(np.arange(1, 2**14)))).astype(np.float32)

# Han and kana: no spaces between words, so a character is a token.
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[^\W{_SPACELESS}]+|\S")
_ASCII_SYMBOLS = tuple(c for c in map(chr, range(128)) if not (c.isalnum() or c.isspace() or c == "_"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """How a text becomes terms; an artefact carries these settings and never mixes them.

    `ngrams`: 1, or 2 for pairs of neighbours as well. `prefix`: tokens this long or longer also give their first
    `prefix` letters (0: off). `fold_numbers`: any run of digits reads as `0`.
    """

    kind: str = "lexical"
    window_bytes: int = WINDOW_BYTES
    ngrams: int = 1
    prefix: int = 5
    fold_numbers: bool = True

    def __post_init__(self) -> None:
        if self.kind != "lexical":
            raise ValueError(f"features.kind is {self.kind!r}; valid: 'lexical'")
        if self.window_bytes < 1:
            raise ValueError(f"features.window_bytes is {self.window_bytes}; valid: 1 or more")
        if self.ngrams not in (1, 2):
            raise ValueError(f"features.ngrams is {self.ngrams}; valid: 1 or 2")
        if self.prefix < 0:
            raise ValueError(f"features.prefix is {self.prefix}; valid: 0 (off) or more")

    def tokens(self, text: str) -> list[str]:
        text = clip(text, window_bytes=self.window_bytes)
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text)
        text = text.lower()
        if self.fold_numbers:
            for digit in "123456789":  # str.translate is slower, and 40 x slower where a letter is not ASCII
                text = text.replace(digit, "0")
            while "00" in text:
                text = text.replace("00", "0")
        return split(text)

    def terms(self, text: str) -> list[str]:
        """Every term of the text by name, repeats included."""
        tokens = self.tokens(text)
        terms = list(tokens)
        if self.prefix:
            terms += [f"{token[: self.prefix]}*" for token in tokens if len(token) >= self.prefix]
        if self.ngrams == 2:
            terms += [f"{a} {b}" for a, b in pairwise(tokens)]
        return terms


class Vocabulary:
    """The terms that have a row in a table, in row order, and the lookup of a text's rows among them."""

    def __init__(self, terms: Sequence[str], *, features: Features) -> None:
        self.terms = tuple(terms)
        self.features = features
        # Numbered from 1: `filter(None, ...)` then drops the unknown (None) and nothing else.
        self._words: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}
        self._pairs: dict[tuple[str, str], int] = {}
        for number, term in enumerate(self.terms, start=1):
            first, space, second = term.partition(" ")
            if space:
                self._pairs[first, second] = number
            elif len(term) > 1 and term.endswith("*"):
                self._prefixes[term[:-1]] = number
            else:
                self._words[term] = number
        self._rows = _Rows(self._words, self._prefixes, prefix=features.prefix)

    def __len__(self) -> int:
        return len(self.terms)

    def row(self, text: str) -> tuple[Ids, Floats]:
        """The known terms of a text, each once, as row numbers and sublinear term frequencies 1 + ln(count)."""
        tokens = self.features.tokens(text)
        counts = Counter(chain.from_iterable(map(self._rows.__getitem__, tokens)))
        if self._pairs:
            counts.update(filter(None, map(self._pairs.get, pairwise(tokens))))
        ids = np.fromiter(counts, np.intp, len(counts))
        ids -= 1
        return ids, _SUBLINEAR.take(np.fromiter(counts.values(), np.intp, len(counts)), mode="clip")


class _Rows(dict[str, tuple[int, ...]]):
    """Token -> the numbers of its rows, of the word and of its beginning; what has once been looked up is kept."""

    def __init__(self, words: Mapping[str, int], prefixes: Mapping[str, int], *, prefix: int) -> None:
        super().__init__()
        self._words = words
        self._prefixes = prefixes
        self._prefix = prefix

    def __missing__(self, token: str) -> tuple[int, ...]:
        # A token shorter than the prefix is its own slice and no prefix is that short, so it finds nothing.
        found = self._words.get(token), self._prefixes.get(token[: self._prefix])
        rows = tuple(filter(None, found))
        if len(token) <= LONGEST_TOKEN:
            if len(self) >= MOST_TOKENS:
                self.clear()
            self[token] = rows
        return rows


def clip(text: str, *, window_bytes: int) -> str:
    """The start of a text that fits the window in UTF-8, without lone surrogates or a character cut in two."""
    text = text[:window_bytes]
    if text.isascii():
        return text
    return text.encode("utf-8", "ignore")[:window_bytes].decode("utf-8", "ignore")


def split(text: str) -> list[str]:
    """Tokens of a text. For ASCII, spaces put around each symbol that occurs are 2 x faster than the expression."""
    if not text.isascii():
        return _TOKEN.findall(text)
    for symbol in _ASCII_SYMBOLS:
        if symbol in text:
            text = text.replace(symbol, f" {symbol} ")
    return text.split()


def vocabulary_of(texts: Iterable[str], *, features: Features) -> Vocabulary:
    """All terms of the texts, in sorted order."""
    return Vocabulary(sorted({term for text in texts for term in features.terms(text)}), features=features)
