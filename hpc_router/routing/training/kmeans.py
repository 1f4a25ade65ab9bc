"""Balanced k-means on unit vectors: no cluster may hold much more than its share, or one expert would get it all.

Lloyd's steps, where each cluster has a price that rises with what it holds beyond its share: an auction's idea, with
all prompts bidding at once. Prices are for training alone; a prompt is later given to its nearest centre. Several
beginnings, all from one seed; the best of them by the similarity it reaches.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

STEPS: Final = 40
BEGINNINGS: Final = 4
MAX_OF_SHARE: Final = 2.0
"""How many times its even share a cluster may hold."""
STRENGTH: Final = 1.0
_ROUNDS: Final = 60

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]


def balanced_centres(vectors: Floats, *, clusters: int, seed: int, spherical: bool = True) -> tuple[Floats, Ids]:
    """Centres and each vector's cluster. `spherical`: centres of length one: the nearest has the best cosine."""
    best: tuple[float, Floats, Ids] | None = None
    for beginning in range(BEGINNINGS):
        centres = _begin(vectors, clusters=clusters, rng=np.random.default_rng([seed, beginning]))
        held = np.full(len(vectors), -1)
        for _ in range(STEPS):
            likeness = _likeness(vectors, centres)
            now = _assign(likeness)
            if (now == held).all():
                break
            held = now
            centres = centres_of(vectors, held, clusters=clusters, spherical=spherical, before=centres)
        reached = float(likeness[np.arange(len(vectors)), held].sum())
        if best is None or reached > best[0]:
            best = reached, centres, held
    assert best is not None
    return best[1], best[2]


def centres_of(vectors: Floats, held: Ids, *, clusters: int, spherical: bool, before: Floats | None = None) -> Floats:
    sums = np.zeros((clusters, vectors.shape[1]), np.float64)
    np.add.at(sums, held, vectors)
    counts = np.bincount(held, minlength=clusters)[:, None]
    means = sums / np.maximum(counts, 1)
    if before is not None:
        means = np.where(counts > 0, means, before)
    if spherical:
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return means.astype(np.float32)


def discriminants(vectors: Floats, held: Ids, *, clusters: int) -> Floats:
    """For each cluster the direction, of length one, in which its vectors differ from the others', as ridge regression
    finds it; of strength without end, that of its mean. A cluster without vectors has none: zeros."""
    own = np.eye(clusters)[held]
    apart = vectors.astype(np.float64) - vectors.mean(axis=0)
    gram = apart.T @ apart + STRENGTH * np.eye(apart.shape[1])
    found = np.linalg.solve(gram, apart.T @ (own - own.mean(axis=0))).T
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return found.astype(np.float32)


def _likeness(vectors: Floats, centres: Floats) -> Floats:
    """Greater is nearer: the cosine up to what is the same for all centres."""
    likeness: Floats = vectors @ centres.T - 0.5 * np.square(centres).sum(axis=1)
    return likeness


def _begin(vectors: Floats, *, clusters: int, rng: np.random.Generator) -> Floats:
    """k-means++: each next centre far from those before it."""
    chosen = [int(rng.integers(len(vectors)))]
    far = np.square(vectors - vectors[chosen[0]]).sum(axis=1).astype(np.float64)
    while len(chosen) < clusters:
        total = far.sum()
        weights = far / total if total > 0 else np.full(len(vectors), 1 / len(vectors))
        chosen.append(int(np.searchsorted(np.cumsum(weights), rng.random()).clip(0, len(vectors) - 1)))
        far = np.minimum(far, np.square(vectors - vectors[chosen[-1]]).sum(axis=1))
    return vectors[chosen].astype(np.float32)


def _assign(likeness: Floats) -> Ids:
    """To the nearest centre after its price; prices rise where too many come, until none holds too much."""
    rows, clusters = likeness.shape
    most = max(1.0, MAX_OF_SHARE * rows / clusters)
    price = np.zeros(clusters, np.float32)
    step = np.float32(0.02)
    held: Ids = likeness.argmax(axis=1)
    for _ in range(_ROUNDS):
        load = np.bincount(held, minlength=clusters)
        if load.max() <= most:
            break
        price += step * np.maximum(load / most - 1, 0).astype(np.float32)
        held = (likeness - price).argmax(axis=1)
    return held
