"""Ridge regression from the TF-IDF rows of prompts to their labels: the feature space of `exemplars` with `lexical`.

The vector of a prompt has a dimension per label: 1 for its own label, 0 for the others. The regression predicts it from
words, symbols, prefixes and pairs of words. Cross-validation over the prompts chooses the strength of regularisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hpc_router.routing.features import Doubles, Features, Floats, Ids, Mask, Vocabulary, counts_of
from hpc_router.routing.training.feature_spaces import frequent_vocabulary, smooth_idf, tfidf_rows

STRENGTHS: Final = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS: Final = 5
ENOUGH_TEXTS: Final = 200
"""Number of prompts from which a term of a single prompt is left out."""
SOLVER_STEPS: Final = 80
SOLVER_TOLERANCE: Final = 1e-3


@dataclass(kw_only=True)
class RidgeSpace:
    """A feature space whose dimensions are labels. Row i of `rows`, `vectors` and `weight` belongs to prompt i."""

    vocabulary: Vocabulary
    idf: Doubles
    rows: Any
    """Sparse TF-IDF matrix, prompts x terms."""
    vectors: Floats
    """The label of each prompt, one-hot: prompts x labels."""
    weight: Doubles
    """Weight of each prompt in the regression."""
    strength: float
    spherical: bool = True
    dimensions: Floats | None = None

    def fold(self, directions: Floats, *, held_out: Mask | None = None) -> Floats:
        """Returns weights, terms x directions. Their sum over a prompt's terms predicts the scalar product of the
        direction and the prompt's label vector, except for a constant per direction. `held_out`: mask of prompts
        without influence on the weights."""
        weight = self.weight if held_out is None else np.where(held_out, 0.0, self.weight)
        solution = _solution(self.rows, self.vectors @ directions.T, weight, strength=self.strength)
        return (solution * self.idf[:, None]).astype(np.float32)


def label_space(texts: Sequence[str], labels: Ids, *, count: int, seed: int) -> RidgeSpace:
    """Returns the space that was fitted to prompts and their labels, which are numbers from 0 to `count` - 1."""
    min_texts = 1 if len(texts) < ENOUGH_TEXTS else 2
    vocabulary = frequent_vocabulary(texts, features=Features(ngrams=2), min_texts=min_texts)
    counts = counts_of(texts, vocabulary=vocabulary)
    idf = smooth_idf(counts)
    rows = tfidf_rows(counts, idf)
    vectors, weight = np.eye(count, dtype=np.float32)[labels], np.ones(len(texts))
    fold = random_folds(len(texts), seed=seed)

    def share_right(strength: float) -> float:
        predicted = held_out_predictions(rows, vectors, weight, fold, strength=strength).argmax(axis=1)
        return float(np.mean(predicted == labels))

    return RidgeSpace(
        vocabulary=vocabulary,
        idf=idf,
        rows=rows,
        vectors=vectors,
        weight=weight,
        strength=max(STRENGTHS, key=share_right),
    )


def random_folds(count: int, *, seed: int) -> Ids:
    """Returns the fold of each of `count` prompts, 0 to FOLDS - 1."""
    return np.random.default_rng([seed, 2]).permutation(count) % FOLDS


def held_out_predictions(rows: Any, vectors: Floats, weight: Doubles, fold: Ids, *, strength: float) -> Floats:
    """Returns a predicted vector for each prompt (prompts x dimensions), from the regression over the prompts of all
    other folds. Within a fold, a constant is missing in each dimension, because the targets are centred."""
    rows = rows.tocsr()
    predicted = np.zeros_like(vectors)
    for number in np.unique(fold):
        held_out = fold == number
        solution = _solution(rows, vectors, np.where(held_out, 0.0, weight), strength=strength)
        predicted[held_out] = rows[held_out] @ solution
    return predicted


def _solution(rows: Any, targets: Floats, weight: Doubles, *, strength: float) -> Floats:
    """Returns the coefficients, terms x targets, of the weighted ridge regression of the centred `targets` on
    `rows`."""
    from scipy import sparse

    root = np.sqrt(weight)
    mean = (targets * weight[:, None]).sum(axis=0) / weight.sum()
    centred = ((targets - mean) * root[:, None]).astype(np.float32)
    return ridge_regression(sparse.diags_array(root) @ rows, centred, strength=strength)


def ridge_regression(rows: Any, targets: Floats, *, strength: float) -> Floats:
    """Solves a ridge regression of `targets` on `rows` by conjugate gradients. Returns the coefficients: columns of
    `rows` x columns of `targets`.

    All columns of `targets` are solved together, each with its own step sizes.
    """
    rows = rows.astype(np.float32).tocsr()
    transposed = rows.T.tocsr()
    residual: Floats = transposed @ targets
    solution = np.zeros_like(residual)
    direction, squared = residual.copy(), np.square(residual).sum(axis=0)
    tolerance = squared * SOLVER_TOLERANCE**2
    for _ in range(SOLVER_STEPS):
        image = transposed @ (rows @ direction) + np.float32(strength) * direction
        step = squared / np.maximum((direction * image).sum(axis=0), 1e-30)
        solution += step * direction
        residual -= step * image
        new_squared = np.square(residual).sum(axis=0)
        if (new_squared <= tolerance).all():
            break
        direction = residual + new_squared / np.maximum(squared, 1e-30) * direction
        squared = new_squared
    return solution
