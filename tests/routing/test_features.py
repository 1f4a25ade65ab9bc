"""Splitting a text into terms, in several scripts."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.routing.classifier import Classifier
from hpc_router.routing.features import _UNSPACED_RUN, Features, clip, clip_ends, vocabulary_of
from hpc_router.routing.training.feature_spaces import frequent_vocabulary
from tests.routing.samples import EXEMPLARS, artefact

ANY_TEXT = st.text(st.characters(), max_size=300)


def tokens(text: str, **options: object) -> list[str]:
    return Features(**{"prefix": 0, **options}).terms(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("What is x^2 + 3?", ["what", "is", "x", "0", "^", "+", "?"]),
        ("foo_bar(42)", ["foo_bar", "00", "(", ")"]),
        ("int32 1999 1999", ["int00", "0000"]),
        ("  \n\t ", []),
        ("", []),
        ("病人发烧python函 数", ["病人", "人发", "发烧", "python", "函", "数"]),
        ("カタカナ、ひら", ["カタ", "タカ", "カナ", "、", "ひら"]),
        ("ภาษาไทย abc", ["ภา", "าษ", "ษา", "าไ", "ไท", "ทย", "abc"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("مُحَمَّد", ["مُحَمَّد"]),
        ("q\u0307x می\u200cخواهم", ["q\u0307x", "میخواهم"]),
        ("Ünïcode ΣΑΣ Привет!", ["ünïcode", "σας", "привет", "!"]),
        ("inﬂuence ｆｕｌｌ e\u0301", ["influence", "full", "é"]),
        ("∫ √2", ["∫", "√", "0"]),
        ("a\x1cb\x00c", ["a", "b", "c"]),
        ("a\u2028b\x85c\u1680d\u2003e\u00a0é", ["a", "b", "c", "d", "e", "é"]),
        ("It’s “so” – really…", ["it", "s", "so", "really", "'", '"', "-", "."]),
    ],
)
def test_words_symbols_and_digits_are_kept_in_any_script(text: str, terms: list[str]) -> None:
    assert tokens(text) == terms


def test_digits_are_kept_when_not_folded() -> None:
    assert tokens("17 of x1 ü2", fold_numbers=False) == ["17", "of", "x1", "ü2"]


def test_terms_are_tokens_prefixes_and_pairs() -> None:
    terms = Features(prefix=4, ngrams=2).terms("my codes * my codes")
    assert terms == ["my", "codes", "*", "code*", "my codes", "codes my"]


def test_cbtm_gives_words_with_repeats() -> None:
    result = Features(kind="cbtm", prefix=0).terms("The 3 cats, 3rd cats: x = über_1")
    assert result == ["the", "cats", "cats", "über_1"]


def test_only_the_window_is_read() -> None:
    assert tokens("abcde fgh", window_bytes=5, text_version=1) == ["abcde"]
    assert tokens("ééé", window_bytes=5, text_version=1) == ["éé"]
    assert tokens("…abcde fgh", window_bytes=8, text_version=1) == ["abcde", "."]


def test_both_ends_of_a_long_text_are_read() -> None:
    text = f"first {'x ' * 3000}last"
    assert {"first", "last"} <= {*tokens(text, window_bytes=40)}
    assert {"éins", "zwöi"} <= {*tokens(f"éins {'ö ' * 3000}zwöi", window_bytes=40)}
    assert "last" not in tokens(text, window_bytes=40, text_version=1)


def test_version_1_takes_single_characters_and_splits_at_marks() -> None:
    """Artefacts of before have the terms that this gives."""
    assert tokens("病人python函数 हि", text_version=1) == ["病", "人", "python", "函", "数", "ह", "ि"]


@settings(deadline=None)
@given(ANY_TEXT, st.sampled_from(["lexical", "cbtm"]))
def test_the_versions_agree_where_there_are_neither_marks_nor_unspaced_scripts(text: str, kind: str) -> None:
    old, new = (Features(kind=kind, prefix=0, text_version=version) for version in (1, 2))
    special = any(unicodedata.category(c)[0] == "M" or c in "\u200c\u200d" for c in unicodedata.normalize("NFKD", text))
    if not special and not _UNSPACED_RUN.search(unicodedata.normalize("NFKC", text)):
        assert new.terms(text) == old.terms(text)


@settings(deadline=None)
@given(ANY_TEXT, st.integers(1, 50))
def test_both_ends_fit_the_window(text: str, window_bytes: int) -> None:
    clean = text.encode("utf-8", "ignore").decode()
    clipped = clip_ends(text, window_bytes=window_bytes)
    assert len(clipped.encode()) <= window_bytes
    if len(clean.encode()) <= window_bytes and len(text) <= window_bytes:
        assert clipped == clean


def test_cbtm_gives_pairs_of_characters_and_whole_words_with_marks() -> None:
    result = Features(kind="cbtm", prefix=0).terms("病人发烧, हिन्दी (it’s)")
    assert result == ["病人", "人发", "发烧", "हिन्दी", "it"]


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=200))
def test_the_ascii_and_the_unicode_path_agree(text: str) -> None:
    """A text with one letter beyond ASCII takes the Unicode path and gives the same other terms."""
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


@settings(deadline=None)
@given(ANY_TEXT)
def test_no_term_is_ambiguous_or_breaks_a_line(text: str) -> None:
    """Vocabularies store one term per line, and the form of a term shows its kind."""
    for term in Features(ngrams=2).terms(text):
        assert "\n" not in term
        assert term.count(" ") <= 1
        term.encode()


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "svd"}, {"kind": "cbtm"}, {"window_bytes": 0}, {"ngrams": 3}, {"ngrams": 0}, {"prefix": -1}],
    ids=str,
)
def test_an_error_names_a_setting_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Features(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("term", ["please", "pleas*", "hello you", "you thanks", "thank*", "would", "greet*"])
def test_words_of_courtesy_are_in_no_vocabulary(term: str) -> None:
    text = "hello you please please greetings to you thanks would the pleasant thankful person sum integers"
    features = Features(ngrams=2)
    assert term in features.terms(text)
    for vocabulary in (
        vocabulary_of([text], features=features),
        frequent_vocabulary([text], features=features, min_texts=1),
    ):
        assert term not in vocabulary.terms
        assert {"pleasant", "person", "sum integers"} <= set(vocabulary.terms)


def test_words_of_courtesy_change_no_decision() -> None:
    classifier = Classifier(artefact())
    for prompt in (prompt for prompts in EXEMPLARS.values() for prompt in prompts):
        assert (
            classifier.classify(f"Hello, could you please help? {prompt} Thanks!").expert
            == classifier.classify(prompt).expert
        )
