"""Text -> terms: what is kept, in which scripts, and that the fast ways agree with the plain ones."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.routing.features import _TOKEN, Features, Vocabulary, clip, split, vocabulary_of

ANY_TEXT = st.text(st.characters(), max_size=300)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("What is x^2 + 3?", ["what", "is", "x", "^", "0", "+", "0", "?"]),
        ("foo_bar(42)", ["foo_bar", "(", "0", ")"]),
        ("int32 1999", ["int0", "0"]),
        ("  \n\t ", []),
        ("", []),
        ("病人python函数", ["病", "人", "python", "函", "数"]),
        ("Ünïcode ΣΑΣ Привет", ["ünïcode", "σας", "привет"]),
        ("inﬂuence ｆｕｌｌ e\u0301", ["influence", "full", "é"]),
        ("∫ √2", ["∫", "√", "0"]),
        ("a\x1cb\x00c", ["a", "b", "\x00", "c"]),
    ],
)
def test_words_symbols_and_digits_are_kept_in_any_script(text: str, tokens: list[str]) -> None:
    assert Features().tokens(text) == tokens


def test_digits_stay_as_they_are_when_not_folded() -> None:
    assert Features(fold_numbers=False).tokens("17 of x1") == ["17", "of", "x1"]


def test_terms_are_tokens_prefixes_and_pairs() -> None:
    assert Features(prefix=4, ngrams=2).terms("my codes *") == ["my", "codes", "*", "code*", "my codes", "codes *"]


def test_only_the_window_is_read() -> None:
    assert Features(window_bytes=5).tokens("abcde fgh") == ["abcde"]
    assert Features(window_bytes=5).tokens("ééé") == ["éé"]


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=200))
def test_the_two_ways_to_split_ascii_agree(text: str) -> None:
    assert split(text) == _TOKEN.findall(text)


@settings(deadline=None)
@given(ANY_TEXT, st.integers(1, 50))
def test_clip_gives_the_longest_start_that_fits(text: str, window_bytes: int) -> None:
    clean = text.encode("utf-8", "ignore").decode()
    clipped = clip(text, window_bytes=window_bytes)
    assert clean.startswith(clipped)
    assert len(clipped.encode()) <= window_bytes
    if clean == text and clipped != clean:
        assert len((clipped + clean[len(clipped)]).encode()) > window_bytes


@settings(deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=5), ANY_TEXT, st.integers(0, 6), st.sampled_from([1, 2]), st.booleans())
def test_a_row_is_the_counted_terms(texts: list[str], text: str, prefix: int, ngrams: int, fold: bool) -> None:
    """The lookups of the hot path find exactly the terms that training names, however odd the text."""
    features = Features(prefix=prefix, ngrams=ngrams, fold_numbers=fold)
    vocabulary = vocabulary_of(texts, features=features)
    for each in [*texts, text]:
        ids, frequencies = vocabulary.row(each)
        expected = {
            term: 1 + np.log(n) for term, n in Counter(features.terms(each)).items() if term in vocabulary.terms
        }
        found = {vocabulary.terms[i]: f for i, f in zip(ids, frequencies, strict=True)}
        assert found == pytest.approx(expected)


@settings(deadline=None)
@given(ANY_TEXT)
def test_no_term_is_ambiguous_or_breaks_a_line(text: str) -> None:
    """Vocabularies are stored as lines, and a term's form says what it is."""
    for term in Features(ngrams=2).terms(text):
        assert "\n" not in term
        assert term.count(" ") <= 1
        term.encode()


def test_a_vocabulary_without_terms_knows_nothing() -> None:
    ids, frequencies = Vocabulary((), features=Features()).row("some text")
    assert (len(ids), len(frequencies)) == (0, 0)


@pytest.mark.parametrize(
    "wrong", [{"kind": "cbtm"}, {"window_bytes": 0}, {"ngrams": 3}, {"ngrams": 0}, {"prefix": -1}], ids=str
)
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Features(**wrong)  # type: ignore[arg-type]
