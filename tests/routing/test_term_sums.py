"""The sums of a table's rows: the terms that training names, exactly, however odd or long the text."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.routing import term_sums
from hpc_router.routing.features import Features, Floats, counts_of, vocabulary_of
from hpc_router.routing.term_sums import TermSums

ANY_TEXT = st.text(st.characters(), max_size=300)
FEATURES = st.builds(
    Features, prefix=st.integers(0, 6), ngrams=st.sampled_from([1, 2]), fold_numbers=st.booleans()
) | st.just(Features(kind="cbtm", prefix=0))


def one_column(values: dict[str, float], **options: object) -> TermSums:
    table = np.array([[value] for value in values.values()], np.float32)
    return TermSums(list(values), table, features=Features(**options))  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=5), ANY_TEXT, FEATURES)
def test_the_rows_add_up_to_those_of_the_terms(texts: list[str], text: str, features: Features) -> None:
    vocabulary = vocabulary_of(texts, features=features)
    added = TermSums(vocabulary.terms, np.eye(len(vocabulary), dtype=np.float32), features=features)
    for each in [*texts, text]:
        found = {term: int(n) for term, n in zip(vocabulary.terms, added.of(each), strict=True) if n}
        assert found == {term: n for term, n in Counter(features.terms(each)).items() if term in vocabulary.terms}
        counts = counts_of([each], vocabulary=vocabulary)
        assert {vocabulary.terms[t]: int(n) for t, n in zip(counts.term, counts.count, strict=True)} == found


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], Floats]:
    words = draw(st.lists(st.text("abcde", min_size=1, max_size=7), min_size=1, max_size=30, unique=True))
    scale = 2.0 ** draw(st.integers(-20, 20))
    values = st.floats(-scale, scale, width=32)
    rows = draw(st.lists(st.lists(values, min_size=3, max_size=3), min_size=len(words), max_size=len(words)))
    return words, np.array(rows, np.float32)


@settings(deadline=None)
@given(tables(), st.lists(st.text("abcde", min_size=1, max_size=7), max_size=60), st.booleans())
def test_the_sums_are_as_near_as_the_largest_value_of_their_column_allows(
    table: tuple[list[str], Floats], words: list[str], fine: bool
) -> None:
    terms, values = table
    added = TermSums(terms, values, features=Features(prefix=0), fine=fine)
    known = [values[terms.index(word)].astype(float) for word in set(words) if word in terms]
    near = np.abs(values).max(axis=0).astype(float) * 2.0 ** (-52 if fine else -20) * max(1, len(known)) + 2.0**-70
    assert (np.abs(np.array(added.of(" ".join(words))) - sum(known, np.zeros(3))) <= near).all()


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("ngrams", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_text_is_too_long_for_its_lanes(sign: int, ngrams: int, fine: bool) -> None:
    """As many terms as a window holds, each at the largest value, and a column beside it that must not notice."""
    words = [chr(a) + chr(b) for a in range(0x4E00, 0x4E40) for b in range(0x61, 0x7B)]
    text = "".join(words)
    features = Features(prefix=0, ngrams=ngrams)
    terms = vocabulary_of([text], features=features).terms
    table = np.array([[0, sign * 3.7, 0]] * len(terms), np.float32)
    below, value, above = TermSums(terms, table, features=features, fine=fine).of(text)
    assert value == pytest.approx(sign * 3.7 * len(features.terms(text)), rel=1e-5)
    assert (below, above) == (0, 0)


def test_what_normalising_makes_of_a_window_is_bounded() -> None:
    """One character of three bytes is four words."""
    features = Features(prefix=0, window_bytes=4)
    terms = features.terms("\ufdfa")
    assert len(terms) == 4
    assert TermSums(terms, np.full((4, 1), 5, np.float32), features=features).of("\ufdfa") == [15]


def test_a_table_without_terms_knows_nothing() -> None:
    assert TermSums((), np.ones((0, 3), np.float32), features=Features()).of("some text") == [0, 0, 0]


def test_what_is_kept_of_unknown_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(term_sums, "MOST_TOKENS", 10)
    added = one_column({"diabetes": 1, "diabe*": 2})
    least = len(added._words)
    for number in range(100):
        added.of(f"word{chr(97 + number % 26)}{chr(97 + number // 26)}")
        assert len(added._words) <= least + 10
    assert added.of("diabetes") == [3]
    assert added.of("diabetic") == [2]


def test_each_term_says_what_it_adds() -> None:
    added = one_column({"diabetes": 1, "diabe*": 2, "+": 4, "the": 8, "of the": 16}, ngrams=2)
    assert added.by_term("Of the + diabetes, diabetic; diabetics") == {
        "the": [8],
        "of the": [16],
        "+": [4],
        "diabetes": [3],
        "diabe*": [4],
    }
