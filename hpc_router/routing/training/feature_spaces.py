"""Feature spaces: map prompts to vectors, and turn a direction in the space into one weight per term.

`cbtm`: TF-IDF of words, truncated SVD to 100 dimensions, scaled to length one, as in c-BTM (arXiv 2303.14177).
`lexical`: the same steps, but each term counts once per prompt, and digits, symbols, word pairs and prefixes are terms
as well. The third space, `distilled`, is in the module `student`. All spaces are linear in the terms, so each cluster
needs only one column of the artefact's table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from hpc_router.routing.features import Doubles, Features, Floats, Mask, TermCounts, Vocabulary, counts_of, is_courtesy

CBTM_DIMENSIONS: Final = 100
LEXICAL_DIMENSIONS: Final = 128
MAX_TERMS: Final = 120_000


class FeatureSpace(Protocol):
    """A feature space that was fitted to the training prompts."""

    vocabulary: Vocabulary
    idf: Doubles
    spherical: bool
    """Whether centroids are scaled to length one. Otherwise they are means, and the nearest centroid wins."""

    @property
    def vectors(self) -> Floats:
        """Returns the vectors of the training prompts: prompts x dimensions, rows of length one."""

    @property
    def dimensions(self) -> Floats | None:
        """Returns the vectors of the terms, terms x dimensions, from which the classifier computes the length of a
        prompt's vector; None if it does not need that length."""

    def fold(self, directions: Floats, *, held_out: Mask | None = None) -> Floats:
        """Returns for each term its weight in each direction, terms x directions. The sum of the weights over a
        prompt's terms is the prompt's component in that direction. `directions`: directions x dimensions.

        `held_out`: mask of training prompts that must not influence the weights.
        """


@dataclass(kw_only=True)
class SvdSpace:
    """A feature space from a truncated SVD."""

    vocabulary: Vocabulary
    idf: Doubles
    spherical: bool
    vectors: Floats
    rows: Any
    """Sparse TF-IDF matrix, prompts x terms."""
    components: Doubles
    """The SVD's components times the idf: terms x dimensions."""

    @property
    def dimensions(self) -> Floats | None:
        return None if self.spherical else self.components.astype(np.float32)

    def fold(self, directions: Floats, *, held_out: Mask | None = None) -> Floats:
        return (self.components @ directions.T.astype(np.float64)).astype(np.float32)


def cbtm(texts: Sequence[str], *, seed: int) -> SvdSpace:
    """Fits the space `cbtm`: `TfidfVectorizer -> TruncatedSVD(100) -> Normalizer`, without English stop words."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    features = Features(kind="cbtm", prefix=0)
    tfidf = TfidfVectorizer(
        analyzer=lambda text: [t for t in features.terms(text) if t not in ENGLISH_STOP_WORDS and not is_courtesy(t)]
    )
    rows = tfidf.fit_transform(texts)
    vocabulary = Vocabulary(tuple(tfidf.get_feature_names_out().tolist()), features)
    return _svd_space(rows, vocabulary, tfidf.idf_, dimensions=CBTM_DIMENSIONS, spherical=False, seed=seed)


def lexical(texts: Sequence[str], *, seed: int) -> SvdSpace:
    """Fits the space `lexical` to the texts."""
    vocabulary = frequent_vocabulary(texts, features=Features(ngrams=2), min_texts=2)
    counts = counts_of(texts, vocabulary=vocabulary)
    idf = smooth_idf(counts)
    rows = tfidf_rows(counts, idf)
    return _svd_space(rows, vocabulary, idf, dimensions=LEXICAL_DIMENSIONS, spherical=True, seed=seed)


def _svd_space(
    rows: Any, vocabulary: Vocabulary, idf: Doubles, *, dimensions: int, spherical: bool, seed: int
) -> SvdSpace:
    """Fits a truncated SVD to `rows`, a sparse TF-IDF matrix texts x terms."""
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(min(dimensions, *(n - 1 for n in rows.shape)), random_state=seed).fit(rows)
    vectors = svd.transform(rows)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return SvdSpace(
        vocabulary=vocabulary,
        idf=idf,
        spherical=spherical,
        vectors=(vectors / np.where(length > 0, length, 1.0)).astype(np.float32),
        rows=rows,
        components=idf[:, None] * svd.components_.T,
    )


def frequent_vocabulary(texts: Sequence[str], *, features: Features, min_texts: int) -> Vocabulary:
    """Returns the terms that occur in at least `min_texts` texts, without those of courtesy, sorted. If there are more
    than MAX_TERMS, returns the most frequent ones."""
    frequency: dict[str, int] = {}
    for text in texts:
        for term in dict.fromkeys(features.terms(text)):
            frequency[term] = frequency.get(term, 0) + 1
    terms = [term for term, count in frequency.items() if count >= min_texts and not is_courtesy(term)]
    if len(terms) > MAX_TERMS:
        terms = sorted(terms, key=lambda term: (-frequency[term], term))[:MAX_TERMS]
    return Vocabulary(tuple(sorted(terms)), features)


def smooth_idf(counts: TermCounts) -> Doubles:
    """Returns ln((1 + texts) / (1 + df)) + 1 for each term, as scikit-learn with `smooth_idf`."""
    df = np.bincount(counts.term, minlength=counts.terms)
    idf: Doubles = np.log((1 + counts.texts) / (1 + df)) + 1
    return idf


def tfidf_rows(counts: TermCounts, idf: Doubles) -> Any:
    """Returns TF-IDF rows of length one, as in the classifier: a sparse matrix texts x terms."""
    from scipy import sparse

    squared = np.bincount(counts.text, weights=counts.count * np.square(idf[counts.term]), minlength=counts.texts)
    length = np.sqrt(np.where(squared > 0, squared, 1.0))
    values = counts.count * idf[counts.term] / length[counts.text]
    return sparse.csr_matrix((values, (counts.text, counts.term)), shape=(counts.texts, counts.terms))
