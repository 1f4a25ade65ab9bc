"""Feature spaces: map prompts to vectors, and fold a direction in the space into one weight per term.

`cbtm`: TF-IDF of words, truncated SVD to 100 dimensions, length one, as c-BTM (arXiv 2303.14177) does it.
`lexical`: the same over sets of tokens, with digits, symbols, word pairs and prefixes as terms. A third space,
`distilled`, is in `student`. All of them are linear in the terms, so a cluster costs one column of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from hpc_router.routing.features import Doubles, Features, Floats, Mask, TermCounts, Vocabulary, counts_of

CBTM_DIMENSIONS: Final = 100
LEXICAL_DIMENSIONS: Final = 128
MAX_TERMS: Final = 120_000


class FeatureSpace(Protocol):
    vocabulary: Vocabulary
    idf: Doubles
    spherical: bool
    """Whether centroids have length one. Otherwise they are means, and the nearest centroid wins."""

    @property
    def vectors(self) -> Floats:
        """The training prompts, prompts x dimensions, in rows of length one."""

    @property
    def dimensions(self) -> Floats | None:
        """terms x dimensions, if the run time needs the length of a prompt's vector in the space; else None."""

    def fold(self, directions: Floats, *, held_out: Mask | None = None) -> Floats:
        """Return terms x directions: the weight of each term for each direction (directions x dimensions).

        `held_out` masks training prompts that must not influence the weights.
        """


@dataclass(kw_only=True)
class SvdSpace:
    vocabulary: Vocabulary
    idf: Doubles
    spherical: bool
    vectors: Floats
    components: Doubles
    """terms x dimensions, multiplied by the idf."""

    @property
    def dimensions(self) -> Floats | None:
        return None if self.spherical else self.components.astype(np.float32)

    def fold(self, directions: Floats, *, held_out: Mask | None = None) -> Floats:
        return (self.components @ directions.T.astype(np.float64)).astype(np.float32)


def cbtm(texts: Sequence[str], *, seed: int) -> SvdSpace:
    """Fit the published pipeline: `TfidfVectorizer -> TruncatedSVD(100) -> Normalizer`, without English stop words."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    features = Features(kind="cbtm", prefix=0)
    tfidf = TfidfVectorizer(analyzer=lambda text: [t for t in features.terms(text) if t not in ENGLISH_STOP_WORDS])
    rows = tfidf.fit_transform(texts)
    vocabulary = Vocabulary(tuple(tfidf.get_feature_names_out().tolist()), features)
    return _svd_space(rows, vocabulary, tfidf.idf_, dimensions=CBTM_DIMENSIONS, spherical=False, seed=seed)


def lexical(texts: Sequence[str], *, seed: int) -> SvdSpace:
    vocabulary = frequent_vocabulary(texts, features=Features(ngrams=2), min_texts=2)
    counts = counts_of(texts, vocabulary=vocabulary)
    idf = smooth_idf(counts)
    rows = tfidf_rows(counts, idf)
    return _svd_space(rows, vocabulary, idf, dimensions=LEXICAL_DIMENSIONS, spherical=True, seed=seed)


def _svd_space(
    rows: Any, vocabulary: Vocabulary, idf: Doubles, *, dimensions: int, spherical: bool, seed: int
) -> SvdSpace:
    """`rows`: sparse TF-IDF matrix, texts x terms."""
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(min(dimensions, *(n - 1 for n in rows.shape)), random_state=seed).fit(rows)
    vectors = svd.transform(rows)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return SvdSpace(
        vocabulary=vocabulary,
        idf=idf,
        spherical=spherical,
        vectors=(vectors / np.where(length > 0, length, 1.0)).astype(np.float32),
        components=idf[:, None] * svd.components_.T,
    )


def frequent_vocabulary(texts: Sequence[str], *, features: Features, min_texts: int) -> Vocabulary:
    """Return the terms that occur in at least `min_texts` texts, sorted; at most MAX_TERMS, the most frequent."""
    frequency: dict[str, int] = {}
    for text in texts:
        for term in dict.fromkeys(features.terms(text)):
            frequency[term] = frequency.get(term, 0) + 1
    terms = [term for term, count in frequency.items() if count >= min_texts]
    if len(terms) > MAX_TERMS:
        terms = sorted(terms, key=lambda term: (-frequency[term], term))[:MAX_TERMS]
    return Vocabulary(tuple(sorted(terms)), features)


def smooth_idf(counts: TermCounts) -> Doubles:
    """Return ln((1 + texts) / (1 + df)) + 1 per term, as scikit-learn's `smooth_idf` does."""
    df = np.bincount(counts.term, minlength=counts.terms)
    idf: Doubles = np.log((1 + counts.texts) / (1 + df)) + 1
    return idf


def tfidf_rows(counts: TermCounts, idf: Doubles) -> Any:
    """Return a sparse matrix texts x terms: TF-IDF rows divided by their length as the run time computes it."""
    from scipy import sparse

    squared = np.bincount(counts.text, weights=counts.count * np.square(idf[counts.term]), minlength=counts.texts)
    length = np.sqrt(np.where(squared > 0, squared, 1.0))
    values = counts.count * idf[counts.term] / length[counts.text]
    return sparse.csr_matrix((values, (counts.text, counts.term)), shape=(counts.texts, counts.terms))
