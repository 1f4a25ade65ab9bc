"""Text -> terms: what is kept, in which scripts, and that the fast ways agree with the plain ones."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.routing import features
from hpc_router.routing.features import Features, Vocabulary, clip, counts_of, vocabulary_of

ANY_TEXT = st.text(st.characters(), max_size=300)


def tokens(text: str, **options: object) -> list[str]:
    return Features(**{"prefix": 0, **options}).terms(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is x^2 + 3?", ["what", "is", "x", "0", "^", "+", "?"]),
        ("foo_bar(42)", ["foo_bar", "00", "(", ")"]),
        ("int32 1999 1999", ["int00", "0000"]),
        ("  \n\t ", []),
        ("", []),
        ("病人python函数", ["病", "人", "python", "函", "数"]),
        ("Ünïcode ΣΑΣ Привет!", ["ünïcode", "σας", "привет", "!"]),
        ("inﬂuence ｆｕｌｌ e\u0301", ["influence", "full", "é"]),
        ("∫ √2", ["∫", "√", "0"]),
        ("a\x1cb\x00c", ["a", "b", "c"]),
        ("a\u2028b\x85c\u1680d\u2003e\u00a0é", ["a", "b", "c", "d", "e", "é"]),
        ("It’s “so” – really…", ["it", "s", "so", "really", "'", '"', "-", "."]),
    ],
)
def test_words_symbols_and_digits_are_kept_in_any_script(text: str, found: list[str]) -> None:
    assert tokens(text) == found


def test_digits_stay_as_they_are_when_not_folded() -> None:
    assert tokens("17 of x1 ü2", fold_numbers=False) == ["17", "of", "x1", "ü2"]


def test_terms_are_tokens_prefixes_and_pairs() -> None:
    terms = Features(prefix=4, ngrams=2).terms("my codes * my codes")
    assert terms == ["my", "codes", "*", "code*", "my codes", "codes my"]


def test_cbtm_reads_words_as_often_as_they_stand_there() -> None:
    found = Features(kind="cbtm", prefix=0).terms("The 3 cats, 3rd cats: x = über_1")
    assert found == ["the", "cats", "cats", "über_1"]


def test_only_the_window_is_read() -> None:
    assert tokens("abcde fgh", window_bytes=5) == ["abcde"]
    assert tokens("ééé", window_bytes=5) == ["éé"]
    assert tokens("…abcde fgh", window_bytes=8) == ["abcde", "."]


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=200))
def test_the_two_ways_to_split_agree(text: str) -> None:
    """What is not ASCII goes another way; one such letter at the end changes nothing before it."""
    plain, other = tokens(text), tokens(f"{text} é")
    assert sorted(other) == sorted([*plain, "é"])


@settings(deadline=None)
@given(ANY_TEXT, st.integers(1, 50))
def test_clip_gives_the_longest_start_that_fits(text: str, window_bytes: int) -> None:
    clean = text.encode("utf-8", "ignore").decode()
    clipped = clip(text, window_bytes=window_bytes)
    assert clean.startswith(clipped)
    assert len(clipped.encode()) <= window_bytes
    if clean == text and clipped != clean:
        assert len((clipped + clean[len(clipped)]).encode()) > window_bytes


FEATURES = st.builds(
    Features, prefix=st.integers(0, 6), ngrams=st.sampled_from([1, 2]), fold_numbers=st.booleans()
) | st.just(Features(kind="cbtm", prefix=0))


@settings(deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=5), ANY_TEXT, FEATURES)
def test_the_rows_add_up_to_those_of_the_terms(texts: list[str], text: str, features: Features) -> None:
    """The lookups of the hot path find exactly the terms that training names, however odd the text."""
    vocabulary = vocabulary_of(texts, features=features)
    table = vocabulary.joined(np.eye(len(vocabulary), dtype=np.float32))
    for each in [*texts, text]:
        sums = table[vocabulary.ids(each)].sum(axis=0)
        found = {term: int(n) for term, n in zip(vocabulary.terms, sums, strict=True) if n}
        assert found == {term: n for term, n in Counter(features.terms(each)).items() if term in vocabulary.terms}
        counts = counts_of([each], vocabulary=vocabulary)
        assert {vocabulary.terms[t]: int(n) for t, n in zip(counts.term, counts.count, strict=True)} == found


@settings(deadline=None)
@given(ANY_TEXT)
def test_no_term_is_ambiguous_or_breaks_a_line(text: str) -> None:
    """Vocabularies are stored as lines, and a term's form says what it is."""
    for term in Features(ngrams=2).terms(text):
        assert "\n" not in term
        assert term.count(" ") <= 1
        term.encode()


def test_a_vocabulary_without_terms_knows_nothing() -> None:
    vocabulary = Vocabulary((), features=Features())
    assert not vocabulary.joined(np.ones((0, 3), np.float32))[vocabulary.ids("some text")].any()


def test_what_is_kept_of_unknown_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MOST_TOKENS", 10)
    vocabulary = vocabulary_of(["diabetes"], features=Features())
    for number in range(100):
        vocabulary.ids(f"word{chr(97 + number % 26)}{chr(97 + number // 26)}")
        assert len(vocabulary._rows) <= 11
    assert vocabulary.terms[vocabulary.ids("diabetes")[0]] == "diabetes"
    assert vocabulary.terms[vocabulary.ids("diabetic")[0]] == "diabe*"


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "svd"}, {"kind": "cbtm"}, {"window_bytes": 0}, {"ngrams": 3}, {"ngrams": 0}, {"prefix": -1}],
    ids=str,
)
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Features(**wrong)  # type: ignore[arg-type]
