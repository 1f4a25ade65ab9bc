"""Sums of table rows: they cover exactly the terms of `Features.terms`, for any text."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.routing import term_sums
from hpc_router.routing.features import Features, Floats, counts_of, letter_sum, misspelt_forms, vocabulary_of
from hpc_router.routing.term_sums import TermSums

ANY_TEXT = st.text(st.characters(), max_size=300)
# A text version without corrections: the terms of a text do not depend on the vocabulary.
FEATURES = st.builds(
    Features,
    prefix=st.integers(0, 6),
    ngrams=st.sampled_from([1, 2]),
    fold_numbers=st.booleans(),
    text_version=st.just(2),
) | st.just(Features(kind="cbtm", prefix=0, text_version=2))


def summed(sums: TermSums, text: str) -> list[float]:
    """The sum of each column over the terms of the text."""
    return [unit * step for unit, step in zip(sums.lanes(text), sums.steps, strict=True)]


def one_column(values: dict[str, float], **options: object) -> TermSums:
    table = np.array([[value] for value in values.values()], np.float32)
    return TermSums(list(values), table, features=Features(**options))  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=5), ANY_TEXT, FEATURES)
def test_the_sums_count_the_terms_of_the_text(texts: list[str], text: str, features: Features) -> None:
    vocabulary = vocabulary_of(texts, features=features)
    sums = TermSums(vocabulary.terms, np.eye(len(vocabulary), dtype=np.float32), features=features)
    for each in [*texts, text]:
        result = {term: int(n) for term, n in zip(vocabulary.terms, summed(sums, each), strict=True) if n}
        assert result == {term: n for term, n in Counter(features.terms(each)).items() if term in vocabulary.terms}
        counts = counts_of([each], vocabulary=vocabulary)
        assert {vocabulary.terms[t]: int(n) for t, n in zip(counts.term, counts.count, strict=True)} == result


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], Floats]:
    words = draw(st.lists(st.text("abcde", min_size=1, max_size=7), min_size=1, max_size=30, unique=True))
    scale = 2.0 ** draw(st.integers(-20, 20))
    values = st.floats(-scale, scale, width=32)
    rows = draw(st.lists(st.lists(values, min_size=3, max_size=3), min_size=len(words), max_size=len(words)))
    return words, np.array(rows, np.float32)


@settings(deadline=None)
@given(tables(), st.lists(st.text("abcde", min_size=1, max_size=7), max_size=60), st.booleans())
def test_the_rounding_error_is_bounded_by_the_largest_value_of_the_column(
    table: tuple[list[str], Floats], words: list[str], wide_lanes: bool
) -> None:
    terms, values = table
    sums = TermSums(terms, values, features=Features(prefix=0, text_version=2), wide_lanes=wide_lanes)
    known = [values[terms.index(word)].astype(float) for word in set(words) if word in terms]
    near = (
        np.abs(values).max(axis=0).astype(float) * 2.0 ** (-52 if wide_lanes else -20) * max(1, len(known)) + 2.0**-70
    )
    assert (np.abs(np.array(summed(sums, " ".join(words))) - sum(known, np.zeros(3))) <= near).all()


@pytest.mark.parametrize("wide_lanes", [False, True])
@pytest.mark.parametrize("ngrams", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_longest_text_does_not_overflow_its_lane(sign: int, ngrams: int, wide_lanes: bool) -> None:
    """A full window of terms with the largest value changes only its own column, not the neighbours."""
    words = [chr(a) + chr(b) for a in range(0x4E00, 0x4E40) for b in range(0x61, 0x7B)]
    text = "".join(words)
    features = Features(prefix=0, ngrams=ngrams)
    terms = vocabulary_of([text], features=features).terms
    table = np.array([[0, sign * 3.7, 0]] * len(terms), np.float32)
    below, value, above = summed(TermSums(terms, table, features=features, wide_lanes=wide_lanes), text)
    assert value == pytest.approx(sign * 3.7 * len(features.terms(text)), rel=1e-5)
    assert (below, above) == (0, 0)


def test_the_number_of_words_after_normalisation_is_limited() -> None:
    """NFKC turns this single character of three bytes into four words."""
    features = Features(prefix=0, window_bytes=4)
    terms = features.terms("\ufdfa")
    assert len(terms) == 4
    assert summed(TermSums(terms, np.full((4, 1), 5, np.float32), features=features), "\ufdfa") == [15]


def test_without_terms_all_sums_are_zero() -> None:
    assert summed(TermSums((), np.ones((0, 3), np.float32), features=Features()), "some text") == [0, 0, 0]


def test_the_cache_of_unknown_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(term_sums, "MAX_TOKENS", 10)
    sums = one_column({"diabetes": 1, "diabe*": 2})
    initial = len(sums._token_rows)
    for number in range(100):
        summed(sums, f"word{chr(97 + number % 26)}{chr(97 + number // 26)}")
        assert len(sums._token_rows) <= initial + 10
    assert summed(sums, "diabetes") == [3]
    assert summed(sums, "diabetic") == [2]


def test_by_term_gives_the_contribution_of_each_term() -> None:
    sums = one_column({"diabetes": 1, "diabe*": 2, "+": 4, "the": 8, "of the": 16}, ngrams=2)
    assert sums.by_term("Of the + diabetes, diabetic; diabetics") == {
        "the": [8],
        "of the": [16],
        "+": [4],
        "diabetes": [3],
        "diabe*": [4],
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("diabetes", 3),  # the word and its prefix
        ("diabtees", 3),
        ("diaabetes", 3),
        ("diabettes", 2),  # its own prefix is known
        ("Diabtees!", 3),
        ("diabetic", 2),
        ("diabtic", 0),  # neither two letters swapped nor one doubled
        ("diatbic", 0),
        ("dibaetic", 0),
        ("idabetes", 0),  # the first letter stays
        ("from", 4),
        ("form", 4),
        ("teh", 0),
        ("x1abc", 0),
    ],
)
def test_a_word_with_two_letters_swapped_or_one_doubled_counts_as_the_word(text: str, value: int) -> None:
    table: dict[str, float] = {"diabetes": 1, "diabe*": 2, "from": 4, "the": 8, "xa1bc": 16}
    assert summed(one_column(table), text) == [value]


@pytest.mark.parametrize("text_version", [1, 2])
def test_artefacts_of_before_do_not_correct_words(text_version: int) -> None:
    sums = one_column({"diabetes": 1, "diabe*": 2, "from": 4}, text_version=text_version)
    assert [summed(sums, text) for text in ("diabtees", "diabettes", "form")] == [[0], [2], [0]]


def test_a_known_word_is_no_misspelling_of_another() -> None:
    assert summed(one_column({"form": 1, "from": 2}), "form") == [1]


def test_by_term_names_the_word_that_a_misspelt_one_stands_for() -> None:
    sums = one_column({"diabetes": 1, "diabe*": 2})
    assert sums.by_term("diabtees diabetic") == {"diabetes": [3], "diabe*": [2]}


def test_only_known_letters_make_a_misspelt_form() -> None:
    """Most unknown words are no misspellings, and must not make a decision slow."""
    known = {letter_sum(b"letters")}
    assert misspelt_forms(b"lettesr", known_letters=known) == [
        *(b"ltetesr", b"lettesr", b"letetsr", b"lettser", b"letters")
    ]
    assert misspelt_forms(b"lettters", known_letters=known) == [b"letters", b"letters"]
    assert misspelt_forms(b"littles", known_letters=known) == []


def test_long_tokens_have_no_misspelt_forms() -> None:
    class Everything(set[int]):
        def __contains__(self, item: object) -> bool:
            return True

    assert len(misspelt_forms(b"abcdefghijklmnopqrst", known_letters=Everything())) == 18
    assert misspelt_forms(b"abcdefghijklmnopqrstu", known_letters=Everything()) == []
