"""Text -> terms, the same for training and for a decision.

`lexical`: a token is a lower-cased word or number, or a single symbol; digits, one-letter words and operators stay,
because maths and code are made of them; scripts written without spaces give one token per character. A text is the set
of its tokens: how often a prompt repeats a word says little. A term is a token, `diabe*` (a longer token's beginning)
or `a b` (two words in a row); no token holds a space or mixes letters with `*`, so one string names each.
`cbtm`: words of two characters and more with their counts, as c-BTM (arXiv 2303.14177) reads a document.
Splitting is C loops (translate, split). This module knows nothing of weights, clusters or experts.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

KINDS: Final = ("lexical", "cbtm")
WINDOW_BYTES: Final = 2048

Ids = NDArray[np.intp]
Floats = NDArray[np.float32]

# Han and kana: no spaces between words, so a character is a token.
_SPACELESS: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# What is a token by itself: these, and any symbol beyond ASCII. One set first, which re can search for quickly.
_ALONE: Final = re.compile(rf"([^\x00-\x7f])(?<![^\W{_SPACELESS}])")
_CBTM_WORD: Final = re.compile(r"(?u)\b\w\w+\b")
_WORD_BYTES: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"
SYMBOLS: Final = bytes(c for c in range(33, 127) if c not in _WORD_BYTES)
_NO_SYMBOLS: Final = bytes(c for c in range(256) if c not in SYMBOLS)
# What word processors make of ASCII's marks; most texts that are not ASCII have nothing else.
_TYPOGRAPHIC: Final = (
    ("’", "'"),
    ("‘", "'"),
    ("“", '"'),
    ("”", '"'),
    ("–", "-"),
    ("—", "-"),
    ("…", "..."),
    ("\u00a0", " "),
)
# Bytes know no other spaces than ASCII's; NFKC leaves these.
_SPACES: Final = ("\x85", "\u1680", "\u2028", "\u2029")


def _word_table(*, fold_numbers: bool) -> bytes:
    """For bytes.translate: letters in lower case, digits as `0` if wanted, a space for the rest of ASCII."""
    table = bytearray(b" " * 128) + bytes(range(128, 256))
    for byte in _WORD_BYTES:
        table[byte] = ord("0") if fold_numbers and chr(byte).isdigit() else ord(chr(byte).lower())
    return bytes(table)


_WORDS: Final = {fold: _word_table(fold_numbers=fold) for fold in (False, True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """How a text becomes terms; an artefact carries these settings and never mixes them.

    `ngrams`: 1, or 2 for pairs of neighbouring words as well. `prefix`: tokens this long or longer also give their
    first `prefix` letters (0: off). `fold_numbers`: every digit reads as `0`. `cbtm` has none of these.
    """

    kind: str = "lexical"
    window_bytes: int = WINDOW_BYTES
    ngrams: int = 1
    prefix: int = 5
    fold_numbers: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"features.kind is {self.kind!r}; valid: {', '.join(KINDS)}")
        if self.window_bytes < 1:
            raise ValueError(f"features.window_bytes is {self.window_bytes}; valid: 1 or more")
        if self.ngrams not in (1, 2):
            raise ValueError(f"features.ngrams is {self.ngrams}; valid: 1 or 2")
        if self.prefix < 0:
            raise ValueError(f"features.prefix is {self.prefix}; valid: 0 (off) or more")
        if self.kind == "cbtm" and (self.ngrams, self.prefix) != (1, 0):
            raise ValueError("features.kind 'cbtm' has neither pairs nor prefixes: ngrams=1 prefix=0")

    def split(self, text: str) -> tuple[list[bytes], bytes]:
        """The words in UTF-8, in order and with repeats, symbols beyond ASCII among them; and the ASCII symbols."""
        if self.kind == "cbtm":
            text = clip(text, window_bytes=self.window_bytes).lower()
            return [word.encode() for word in _CBTM_WORD.findall(text) if not word[0].isdigit()], b""
        try:
            raw = text[: self.window_bytes].encode("ascii")
        except UnicodeEncodeError:
            return self._split_any(clip(text, window_bytes=self.window_bytes))
        return raw.translate(_WORDS[self.fold_numbers]).split(), raw.translate(None, _NO_SYMBOLS)

    def _split_any(self, text: str) -> tuple[list[bytes], bytes]:
        for mark, plain in _TYPOGRAPHIC:
            text = text.replace(mark, plain)
        if not text.isascii():
            if not unicodedata.is_normalized("NFKC", text):
                text = unicodedata.normalize("NFKC", text)
            for space in _SPACES:
                text = text.replace(space, " ")
            text = " ".join(_ALONE.split(text.lower()))
        raw = text.encode()
        return raw.translate(_WORDS[self.fold_numbers]).split(), raw.translate(None, _NO_SYMBOLS)

    def terms(self, text: str) -> list[str]:
        """Every term of the text by name; each token once (`cbtm`: as often as it stands there)."""
        words, symbols = self.split(text)
        if self.kind == "cbtm":
            return [word.decode() for word in words]
        names = [word.decode() for word in dict.fromkeys(words)]
        terms = [*names, *(chr(symbol) for symbol in dict.fromkeys(symbols))]
        if self.prefix:
            terms += [f"{name[: self.prefix]}*" for name in names if len(name) >= self.prefix]
        if self.ngrams == 2:
            terms += [f"{a.decode()} {b.decode()}" for a, b in dict.fromkeys(pairwise(words))]
        return terms


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The terms that have a row in a table, in row order."""

    terms: tuple[str, ...]
    features: Features

    def __len__(self) -> int:
        return len(self.terms)


def clip(text: str, *, window_bytes: int) -> str:
    """The start of a text that fits the window in UTF-8, without lone surrogates or a character cut in two."""
    text = text[:window_bytes]
    if text.isascii():
        return text
    return text.encode("utf-8", "ignore")[:window_bytes].decode("utf-8", "ignore")


def vocabulary_of(texts: Iterable[str], *, features: Features) -> Vocabulary:
    """All terms of the texts, in sorted order."""
    return Vocabulary(tuple(sorted({term for text in texts for term in features.terms(text)})), features)


@dataclass(frozen=True, slots=True, kw_only=True)
class TermCounts:
    """Sparse rows: entry i says that text `text[i]` has term `term[i]` so often."""

    text: Ids
    term: Ids
    count: NDArray[np.float64]
    texts: int
    terms: int = field(default=0)


def counts_of(texts: Sequence[str], *, vocabulary: Vocabulary) -> TermCounts:
    number = {term: row for row, term in enumerate(vocabulary.terms)}
    found: list[dict[int, int]] = []
    for text in texts:
        row: dict[int, int] = {}
        for term in vocabulary.features.terms(text):
            if (at := number.get(term)) is not None:
                row[at] = row.get(at, 0) + 1
        found.append(row)
    entries = sum(map(len, found))
    return TermCounts(
        text=np.repeat(np.arange(len(texts)), [len(row) for row in found]),
        term=np.fromiter(chain.from_iterable(found), np.intp, entries),
        count=np.fromiter(chain.from_iterable(row.values() for row in found), np.float64, entries),
        texts=len(texts),
        terms=len(vocabulary),
    )
