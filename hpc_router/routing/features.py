"""Splits a text into terms, in the same way for training and for routing.

Kind `lexical`: a token is a lower-cased word or number, or a single symbol. Digits, one-letter words and operators are
kept because mathematics and code consist of them. In scripts without spaces, every two neighbouring characters are a
token. A combining mark belongs to the word that it stands in. Each token counts once per text, because repetition
carries little information. A term is a token, a token prefix (`diabe*`) or a pair of neighbouring words (`a b`). No
token contains a space or mixes letters with `*`, so terms are unambiguous.

Kind `cbtm`: words of two or more characters with their counts, as in c-BTM (arXiv 2303.14177).

Of a text longer than the window, both ends are read. Lower values of `text_version` keep the rules that older artefacts
were trained with. Splitting uses functions written in C (translate, split). This module must not know weights, clusters
or experts.
"""

import hashlib
import re
import unicodedata
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

KINDS: Final = ("lexical", "cbtm")
WINDOW_BYTES: Final = 2048

Ids = NDArray[np.intp]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]

TEXT_VERSION: Final = 3

# Han and kana are written without spaces.
_UNSPACED: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# A single-character token: a Han or kana character, or a symbol beyond ASCII. The first character class speeds it up.
_SINGLE_TOKEN: Final = re.compile(rf"([^\x00-\x7f])(?<![^\W{_UNSPACED}])")
# Also written without spaces: Thai, Lao, Myanmar and Khmer; their vowel signs are marks.
_UNSPACED_RUN: Final = re.compile(rf"[{_UNSPACED}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+")
_SYMBOL_OR_MARK: Final = re.compile(r"[^\x00-\x7f\w]")
_JOINERS: Final = "\u200c\u200d"  # invisible characters between letters of one word
_CBTM_SPACES: Final = {c: " " for c in range(128) if not (chr(c).isalnum() or chr(c) == "_")}
_CBTM_WORD: Final = re.compile(r"(?u)\b\w\w+\b")
_WORD_BYTES: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"
SYMBOLS: Final = bytes(c for c in range(33, 127) if c not in _WORD_BYTES)
_NON_SYMBOLS: Final = bytes(c for c in range(256) if c not in SYMBOLS)
# Typographic variants of ASCII characters. Most non-ASCII texts contain no other characters beyond ASCII.
_TYPOGRAPHIC: Final = tuple(zip("’‘“”–—…\u00a0", ("'", "'", '"', '"', "-", "-", "...", " "), strict=True))
MIN_MISSPELT: Final = 4
"""Minimum length of a misspelt word: in a shorter one only the last two letters could be swapped."""
MAX_MISSPELT: Final = 20
"""Maximum length of a misspelt word, because the number of its forms grows with it."""
# A fixed random number for each letter (`letter_sum`).
_LETTER_NUMBERS: Final = tuple(int.from_bytes(hashlib.sha256(bytes([c])).digest()[:7], "big") for c in range(256))
_DOUBLED: Final = re.compile(rb"(.)(?=\1)", re.DOTALL)
# Spaces that `_normalised` replaces itself: bytes.split splits only at ASCII spaces, and NFKC leaves these.
_UNICODE_SPACES: Final = ("\x85", "\u1680", "\u2028", "\u2029")


_COURTESY: Final = frozenset(
    {"hello", "hi", "hey", "dear", "greetings", "please", "thank", "thanks"}
    | {"grateful", "kindly", "regards", "could", "would", "help", "assist"}
    | {"you", "me", "very", "much", "appreciate", "appreciated"}
)
_COURTESY_PREFIXES: Final = frozenset(f"{word[:n]}*" for word in _COURTESY for n in range(5, len(word) + 1))


def _word_table(*, fold_numbers: bool) -> bytes:
    """Returns a table for bytes.translate: letters become lower case, digits stay or become `0`, and the rest becomes
    spaces."""
    table = bytearray(b" " * 128) + bytes(range(128, 256))
    for byte in _WORD_BYTES:
        table[byte] = ord("0") if fold_numbers and chr(byte).isdigit() else ord(chr(byte).lower())
    return bytes(table)


_WORD_TABLES: Final = {fold: _word_table(fold_numbers=fold) for fold in (False, True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The settings that turn a text into terms. An artefact has one set of them.

    `ngrams`: 1, or 2 to add pairs of neighbouring words. `prefix`: a token with at least this number of characters also
    gives the term of its first `prefix` characters (0: off). `fold_numbers`: every digit is read as `0`. Kind `cbtm`
    ignores these three. `text_version`: with less than 3, misspelt words are not recognised (`misspelt_forms`); with 1,
    also only the start of a text is read, tokens in scripts without spaces are single characters, and combining marks
    split words.
    """

    kind: str = "lexical"
    window_bytes: int = WINDOW_BYTES
    ngrams: int = 1
    prefix: int = 5
    fold_numbers: bool = True
    text_version: int = TEXT_VERSION

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"features.kind is {self.kind!r}; valid: {', '.join(KINDS)}")
        if self.window_bytes < 1:
            raise ValueError(f"features.window_bytes is {self.window_bytes}; valid: 1 or more")
        if self.ngrams not in (1, 2):
            raise ValueError(f"features.ngrams is {self.ngrams}; valid: 1 or 2")
        if self.prefix < 0:
            raise ValueError(f"features.prefix is {self.prefix}; valid: 0 (off) or more")
        if not 1 <= self.text_version <= TEXT_VERSION:
            raise ValueError(f"features.text_version is {self.text_version}; valid: 1 to {TEXT_VERSION}")
        if self.kind == "cbtm" and (self.ngrams, self.prefix) != (1, 0):
            raise ValueError("features.kind 'cbtm' has neither pairs nor prefixes: ngrams=1 prefix=0")

    def split(self, text: str) -> tuple[list[bytes], bytes]:
        """Returns the words and the ASCII symbols of the text, each in order and with repetitions.

        The words are UTF-8 and include symbols beyond ASCII. Kind `cbtm` returns no symbols.
        """
        if self.kind == "cbtm":
            return [
                word.encode() for word in self._cbtm_words(self._clipped(text).lower()) if not word[0].isdigit()
            ], b""
        if text.isascii() and len(text) <= self.window_bytes:  # the usual case, without a call of a Python function
            raw = text.encode()
        else:
            text = self._clipped(text)
            raw = (text if text.isascii() else _normalised(text, text_version=self.text_version)).encode()
        return raw.translate(_WORD_TABLES[self.fold_numbers]).split(), raw.translate(None, _NON_SYMBOLS)

    def _clipped(self, text: str) -> str:
        """Returns the text without lone surrogates, cut to the window."""
        return (clip if self.text_version == 1 else clip_ends)(text, window_bytes=self.window_bytes)

    def _cbtm_words(self, text: str) -> list[str]:
        if self.text_version == 1 or text.isascii():
            return _CBTM_WORD.findall(text)
        return [word for word in _spaced(text, symbols=False).translate(_CBTM_SPACES).split() if len(word) > 1]

    def terms(self, text: str) -> list[str]:
        """Returns the terms of the text: each term once, or for kind `cbtm` as often as it occurs."""
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
    """The terms that have a row in a table, in the order of the rows."""

    terms: tuple[str, ...]
    features: Features

    def __len__(self) -> int:
        return len(self.terms)


def clip(text: str, *, window_bytes: int) -> str:
    """Returns the longest start of the text that fits into `window_bytes` of UTF-8. Removes lone surrogates."""
    text = text[:window_bytes]
    if text.isascii():
        return text
    return text.encode("utf-8", "ignore")[:window_bytes].decode("utf-8", "ignore")


def clip_ends(text: str, *, window_bytes: int) -> str:
    """Returns the text without lone surrogates. A text that does not fit into `window_bytes` of UTF-8 is cut to its
    start and its end, half of the window each, with a space between them."""
    text = ends_of(text, window_bytes)
    if text.isascii():
        return text
    encoded = text.encode("utf-8", "ignore")
    if len(encoded) <= window_bytes:
        return encoded.decode()
    start, end = window_bytes // 2, window_bytes - window_bytes // 2 - 1
    tail = encoded[-end:] if end else b""
    return encoded[:start].decode("utf-8", "ignore") + " " + tail.decode("utf-8", "ignore")


def ends_of(text: str, size: int) -> str:
    """Returns the text if it has at most `size` characters, else its start and its end with a space between them."""
    if len(text) <= size:
        return text
    start, end = size // 2, max(size - size // 2 - 1, 0)
    return f"{text[:start]} {text[len(text) - end :]}"[:size]


def _spaced(text: str, *, symbols: bool) -> str:
    """Returns the text with each run of a script without spaces replaced by its pairs of neighbouring characters. If
    `symbols` is true, each symbol beyond ASCII gets spaces around it; otherwise it becomes a space."""

    def pairs(run: re.Match[str]) -> str:
        characters = run[0]
        return f" {' '.join(map(''.join, pairwise(characters)))} " if len(characters) > 1 else f" {characters} "

    def symbol_or_mark(match: re.Match[str]) -> str:
        character = match[0]
        if unicodedata.category(character).startswith("M"):
            return character
        if character in _JOINERS:
            return ""
        return f" {character} " if symbols else " "

    return _SYMBOL_OR_MARK.sub(symbol_or_mark, _UNSPACED_RUN.sub(pairs, text))


def _normalised(text: str, *, text_version: int) -> str:
    """Returns the text in lower case and NFKC. All spaces become ASCII spaces. Symbols beyond ASCII, and the tokens of
    scripts without spaces, get spaces around them."""
    for character, replacement in _TYPOGRAPHIC:
        text = text.replace(character, replacement)
    if text.isascii():
        return text
    if not unicodedata.is_normalized("NFKC", text):
        text = unicodedata.normalize("NFKC", text)
    for space in _UNICODE_SPACES:
        text = text.replace(space, " ")
    if text_version == 1:
        return " ".join(_SINGLE_TOKEN.split(text.lower()))
    return _spaced(text.lower(), symbols=True)


def is_courtesy(term: str) -> bool:
    """Returns whether a term is a word of courtesy, contains one, or is the prefix of one. Such words say nothing of
    the topic but are common in the prompts of some sources, so new vocabularies leave them out."""
    return any(word in _COURTESY or word in _COURTESY_PREFIXES for word in term.split(" "))


def letter_sum(token: bytes) -> int:
    """Returns a number that only depends on the letters of the token and on how often each occurs. Tokens with other
    letters have other numbers, but for a chance of about 2^-50."""
    return sum(map(_LETTER_NUMBERS.__getitem__, token))


def misspelt_forms(token: bytes, *, known_letters: Container[int]) -> list[bytes]:
    """Returns the words of which an unknown `token` may be a misspelling: those with two neighbouring letters swapped,
    then those with one letter less where it stands twice. The first letter stays. Empty for a token with other
    characters than ASCII letters, with fewer than 4, or with more than 20.

    `known_letters`: the letter sums of all known words; forms with other letters are left out, so that few tokens have
    any.
    """
    size, forms = len(token), list[bytes]()
    if not (MIN_MISSPELT <= size <= MAX_MISSPELT and token.isalpha()):
        return forms
    letters = letter_sum(token)
    if letters in known_letters:
        forms += (b"%b%c%c%b" % (token[:n], token[n + 1], token[n], token[n + 2 :]) for n in range(1, size - 1))
    for twice in _DOUBLED.finditer(token):
        if letters - _LETTER_NUMBERS[token[twice.start()]] in known_letters:
            forms.append(token[: twice.start()] + token[twice.start() + 1 :])
    return forms


def vocabulary_of(texts: Iterable[str], *, features: Features) -> Vocabulary:
    """Returns all terms of the texts without those of courtesy, sorted."""
    terms = {term for text in texts for term in features.terms(text)}
    return Vocabulary(tuple(sorted(term for term in terms if not is_courtesy(term))), features)


@dataclass(frozen=True, slots=True, kw_only=True)
class TermCounts:
    """A sparse matrix texts x terms in coordinate form: `count[i]` is the value at row `text[i]`, column `term[i]`.

    `texts` and `terms` are the numbers of rows and columns.
    """

    text: Ids
    term: Ids
    count: Doubles
    texts: int
    terms: int


def counts_of(texts: Sequence[str], *, vocabulary: Vocabulary) -> TermCounts:
    """Returns how often each term occurs in each text, as a sparse matrix. Ignores terms outside the vocabulary."""
    columns = {term: column for column, term in enumerate(vocabulary.terms)}
    rows: list[dict[int, int]] = []
    for text in texts:
        row: dict[int, int] = {}
        for term in vocabulary.features.terms(text):
            if (column := columns.get(term)) is not None:
                row[column] = row.get(column, 0) + 1
        rows.append(row)
    entries = sum(map(len, rows))
    return TermCounts(
        text=np.repeat(np.arange(len(texts)), [len(row) for row in rows]),
        term=np.fromiter(chain.from_iterable(rows), np.intp, entries),
        count=np.fromiter(chain.from_iterable(row.values() for row in rows), np.float64, entries),
        texts=len(texts),
        terms=len(vocabulary),
    )
