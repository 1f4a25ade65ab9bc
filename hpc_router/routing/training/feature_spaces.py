"""Where prompts lie, and how a direction there folds into one weight per term.

`cbtm`: TF-IDF of words, truncated SVD to 100, length one, as c-BTM (arXiv 2303.14177) does it. `lexical`: the same
idea over sets of tokens with digits, symbols, pairs and beginnings kept. `distilled`: the vectors of a sentence
encoder; a ridge regression from the lexical row to what the encoder says stands in for it at run time. It learns from
the prompts, from any further text, and from each word of the encoder's vocabulary alone, which is what lets it place
prompts of which no word was in the training; few prompts are eked out by parts of them and by words put together. What
all texts of a kind have in common is taken off: that a text is one word says nothing of where it lies. All three are
linear in the terms, so a centre costs a column of a table.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hpc_router.routing.features import Features, Floats, Ids, TermCounts, Vocabulary, counts_of
from hpc_router.routing.training.encoder import Progress, Teacher

CBTM_DIMENSIONS: Final = 100
LEXICAL_DIMENSIONS: Final = 128
RIDGE: Final = 1.0
WORD_WEIGHT: Final = 1.0
WORD_WEIGHT_OF_FEW: Final = 0.5
"""Where few texts are eked out."""
LABEL_WEIGHT: Final = 0.1
"""What an exemplar's label counts beside the encoder's cosines."""
ENOUGH_TEXTS: Final = 2000
GROUPS_PER_VARIANT: Final = 4
MAX_WEIGHT: Final = 16.0
"""Fewer prompts than enough weigh more, up to so much each, or the words of the vocabulary would drown them."""
MAX_VARIANT_WORDS: Final = 12
MAX_TERMS: Final = 120_000
SOLVER_STEPS: Final = 80
SOLVER_TOLERANCE: Final = 1e-3

Doubles = NDArray[np.float64]


class Space(Protocol):
    vocabulary: Vocabulary
    idf: Doubles
    spherical: bool
    """Whether centres have length one; else they are means, and the nearest is wanted."""

    @property
    def vectors(self) -> Floats:
        """Of the training prompts, of length one."""

    @property
    def dimensions(self) -> Floats | None:
        """Term by term, where the length of a prompt in the space must be known."""

    def fold(self, centres: Floats, *, without: NDArray[np.bool_] | None = None) -> Floats:
        """terms x centres; `without`: training prompts that must not be learnt from."""


def rows_of(counts: TermCounts, idf: Doubles) -> Any:
    """Sparse TF-IDF rows by their lengths, which are what the run time divides by."""
    from scipy import sparse

    squared = np.bincount(counts.text, weights=counts.count * np.square(idf[counts.term]), minlength=counts.texts)
    length = np.sqrt(np.where(squared > 0, squared, 1.0))
    values = counts.count * idf[counts.term] / length[counts.text]
    return sparse.csr_matrix((values, (counts.text, counts.term)), shape=(counts.texts, counts.terms))


def smooth_idf(counts: TermCounts) -> Doubles:
    holders = np.bincount(counts.term, minlength=counts.terms)
    idf: Doubles = np.log((1 + counts.texts) / (1 + holders)) + 1
    return idf


@dataclass(kw_only=True)
class SvdSpace:
    vocabulary: Vocabulary
    idf: Doubles
    spherical: bool
    vectors: Floats
    components: Doubles
    """terms x dimensions, idf included."""

    @property
    def dimensions(self) -> Floats | None:
        return None if self.spherical else self.components.astype(np.float32)

    def fold(self, centres: Floats, *, without: NDArray[np.bool_] | None = None) -> Floats:
        return (self.components @ centres.T.astype(np.float64)).astype(np.float32)


def cbtm(texts: Sequence[str], *, seed: int) -> SvdSpace:
    """As published, with scikit-learn: `TfidfVectorizer -> TruncatedSVD(100) -> Normalizer`, English stop words."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    features = Features(kind="cbtm", prefix=0)
    tfidf = TfidfVectorizer(analyzer=lambda text: [t for t in features.terms(text) if t not in ENGLISH_STOP_WORDS])
    rows = tfidf.fit_transform(texts)
    svd = TruncatedSVD(min(CBTM_DIMENSIONS, *(n - 1 for n in rows.shape)), random_state=seed).fit(rows)
    return SvdSpace(
        vocabulary=Vocabulary(tuple(tfidf.get_feature_names_out().tolist()), features),
        idf=tfidf.idf_,
        spherical=False,
        vectors=_unit(svd.transform(rows)),
        components=tfidf.idf_[:, None] * svd.components_.T,
    )


def lexical(texts: Sequence[str], *, seed: int) -> SvdSpace:
    from sklearn.decomposition import TruncatedSVD

    vocabulary = vocabulary_for(texts, features=Features(ngrams=2), least=2)
    counts = counts_of(texts, vocabulary=vocabulary)
    idf = smooth_idf(counts)
    rows = rows_of(counts, idf)
    svd = TruncatedSVD(min(LEXICAL_DIMENSIONS, *(n - 1 for n in rows.shape)), random_state=seed).fit(rows)
    return SvdSpace(
        vocabulary=vocabulary,
        idf=idf,
        spherical=True,
        vectors=_unit(svd.transform(rows)),
        components=idf[:, None] * svd.components_.T,
    )


@dataclass(kw_only=True)
class Student:
    vocabulary: Vocabulary
    idf: Doubles
    vectors: Floats
    rows: Any
    """Sparse: the training prompts first."""
    taught: Floats
    """What the encoder says of each row, less what it says on average of such rows."""
    weight: Doubles
    """Of each row in the regression, as the root that it is multiplied with."""
    source: Ids
    """Of each row: the training prompt that it was made of, or -1."""
    encoder: str
    labels: Ids | None = None
    """Of the training prompts, by column, where they count themselves."""
    spherical: bool = True
    dimensions: Floats | None = None

    def fold(self, centres: Floats, *, without: NDArray[np.bool_] | None = None) -> Floats:
        """A column of the regression per centre: the encoder's cosine with it, less what is usual."""
        weight = self.weight.copy()
        if without is not None:
            weight[np.append(without, np.False_)[self.source]] = 0
        wanted = self.taught @ centres.T
        if self.labels is not None:
            own = np.eye(len(centres), dtype=np.float32)[self.labels]
            wanted[: len(own)] += LABEL_WEIGHT * (own - own.mean(axis=0))
        from scipy import sparse

        wanted = (wanted * weight[:, None]).astype(np.float32)
        solved = ridge(sparse.diags_array(weight) @ self.rows, wanted, strength=RIDGE)
        return (solved * self.idf[:, None]).astype(np.float32)


def distilled(
    texts: Sequence[str], *, corpus: Sequence[str], encoder: Teacher, seed: int, progress: Progress
) -> Student:
    from scipy import sparse

    words, read = encoder.words(), [*texts, *corpus]
    lacking = max(ENOUGH_TEXTS - len(read), 0)
    made = variants(texts, words, count=lacking, seed=seed)
    groups = word_groups(words, count=GROUPS_PER_VARIANT * lacking, seed=seed)
    others = [*(text for _, text in made), *groups, *words]
    kinds = {
        "prompts": texts,
        "corpus": corpus,
        "variants": others[: len(made)],
        "word groups": groups,
        "words": words,
    }
    taught = [encoder.encode(part, what=what, progress=progress) for what, part in kinds.items() if part]
    vocabulary = vocabulary_for([*read, *others], features=Features(), least=1)
    counts = counts_of(read, vocabulary=vocabulary)
    idf = smooth_idf(counts)
    # Solved in rows of TF-IDF; the idf is multiplied into the weights at the end.
    rows = sparse.vstack([rows_of(counts, idf), rows_of(counts_of(others, vocabulary=vocabulary), idf)]).tocsr()
    weight = np.ones(rows.shape[0])
    weight[: len(read)] = np.sqrt(min(max(ENOUGH_TEXTS / len(read), 1.0), MAX_WEIGHT))
    weight[len(read) + len(made) + len(groups) :] = np.sqrt(WORD_WEIGHT_OF_FEW if lacking else WORD_WEIGHT)
    source = np.full(rows.shape[0], -1)
    source[: len(texts)] = np.arange(len(texts))
    source[len(read) : len(read) + len(made)] = [number for number, _ in made]
    return Student(
        vocabulary=vocabulary,
        idf=idf,
        vectors=taught[0],
        rows=rows,
        taught=np.vstack([part - part.mean(axis=0) for part in taught]),
        weight=weight,
        source=source,
        encoder=encoder.fingerprint(),
    )


def word_groups(words: Sequence[str], *, count: int, seed: int) -> list[str]:
    """Two to four words of the encoder's vocabulary, which have nothing to do with each other."""
    rng = random.Random(seed)
    return [" ".join(rng.sample(words, min(len(words), rng.randint(2, 4)))) for _ in range(count)]


def variants(texts: Sequence[str], words: Sequence[str], *, count: int, seed: int) -> list[tuple[int, str]]:
    """Further texts to ask the encoder about, each with the number of the one it is made of.

    Some words in a row of a text, in any order among as many words of the encoder's vocabulary.
    """
    rng = random.Random(seed)
    found = []
    for number in islice(cycle(range(len(texts))), count):
        tokens = texts[number].split()
        length = min(len(tokens), rng.randint(1, MAX_VARIANT_WORDS))
        start = rng.randint(0, len(tokens) - length)
        mixed = tokens[start : start + length] + rng.sample(words, min(len(words), rng.randint(0, length)))
        rng.shuffle(mixed)
        found.append((number, " ".join(mixed)))
    return found


def ridge(rows: Any, wanted: Floats, *, strength: float) -> Floats:
    """Conjugate gradients on the normal equations, all columns at once, each with steps of its own."""
    rows = rows.astype(np.float32).tocsr()
    turned = rows.T.tocsr()
    residual: Floats = turned @ wanted
    solved = np.zeros_like(residual)
    step, squared = residual.copy(), np.square(residual).sum(axis=0)
    enough = squared * SOLVER_TOLERANCE**2
    for _ in range(SOLVER_STEPS):
        image = turned @ (rows @ step) + np.float32(strength) * step
        size = squared / np.maximum((step * image).sum(axis=0), 1e-30)
        solved += size * step
        residual -= size * image
        now = np.square(residual).sum(axis=0)
        if (now <= enough).all():
            break
        step = residual + now / np.maximum(squared, 1e-30) * step
        squared = now
    return solved


def vocabulary_for(texts: Sequence[str], *, features: Features, least: int) -> Vocabulary:
    """The terms that at least so many of the texts hold, in sorted order; of too many, those that most hold."""
    holders: dict[str, int] = {}
    for text in texts:
        for term in dict.fromkeys(features.terms(text)):
            holders[term] = holders.get(term, 0) + 1
    kept = [term for term, count in holders.items() if count >= least]
    if len(kept) > MAX_TERMS:
        kept = sorted(kept, key=lambda term: (-holders[term], term))[:MAX_TERMS]
    return Vocabulary(tuple(sorted(kept)), features)


def _unit(vectors: NDArray[np.floating[Any]]) -> Floats:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = (vectors / np.where(length > 0, length, 1.0)).astype(np.float32)
    return unit
