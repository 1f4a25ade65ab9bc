"""Balanced k-means: no cluster gets much more than its even share, so that no expert gets most of the traffic.

The algorithm is Lloyd's, but from the similarity of each cluster a price is subtracted, which rises while the cluster
is too large, as in an auction. Prices apply only to training; the classifier assigns a prompt to its nearest centroid.
Of several runs with random starts from one seed, the result with the highest total similarity is kept.
"""

from typing import Final

import numpy as np

from hpc_router.routing.features import Floats, Ids

MAX_ITERATIONS: Final = 40
RESTARTS: Final = 4
MAX_LOAD_FACTOR: Final = 2.0
"""Maximum size of a cluster, as a multiple of the even share."""
_PRICE_STEP: Final = 0.02
_MAX_PRICE_UPDATES: Final = 60


def balanced_kmeans(vectors: Floats, *, clusters: int, seed: int, spherical: bool = True) -> tuple[Floats, Ids]:
    """Returns the centroids (clusters x dimensions) and the cluster of each vector.

    `spherical`: scale centroids to length one, so that the nearest one is the one with the highest cosine.
    """
    results = []
    for restart in range(RESTARTS):
        centroids = _kmeans_plus_plus(vectors, clusters=clusters, rng=np.random.default_rng([seed, restart]))
        assignment = np.full(len(vectors), -1)
        for _ in range(MAX_ITERATIONS):
            similarity = _similarity(vectors, centroids)
            new_assignment = _balanced_assignment(similarity)
            if (new_assignment == assignment).all():
                break
            assignment = new_assignment
            centroids = centroids_of(vectors, assignment, clusters=clusters, spherical=spherical, empty=centroids)
        total = float(similarity[np.arange(len(vectors)), assignment].sum())
        results.append((total, centroids, assignment))
    _, centroids, assignment = max(results, key=lambda result: result[0])
    return centroids, assignment


def centroids_of(
    vectors: Floats, assignment: Ids, *, clusters: int, spherical: bool, empty: Floats | None = None
) -> Floats:
    """Returns the mean vector of each cluster; with `spherical`, scaled to length one. `empty`: the rows for clusters
    without vectors; None: zeros."""
    sums = np.zeros((clusters, vectors.shape[1]), np.float64)
    np.add.at(sums, assignment, vectors)
    counts = np.bincount(assignment, minlength=clusters)[:, None]
    means = sums / np.maximum(counts, 1)
    if empty is not None:
        means = np.where(counts > 0, means, empty)
    if spherical:
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return means.astype(np.float32)


def _similarity(vectors: Floats, centroids: Floats) -> Floats:
    """Returns vectors x clusters: minus half the squared distance, plus a constant that is the same in each row."""
    similarity: Floats = vectors @ centroids.T - 0.5 * np.square(centroids).sum(axis=1)
    return similarity


def _kmeans_plus_plus(vectors: Floats, *, clusters: int, rng: np.random.Generator) -> Floats:
    """Draws initial centroids from the vectors. The probability of a vector grows with its squared distance to those
    drawn before."""
    chosen = [int(rng.integers(len(vectors)))]
    distance = np.square(vectors - vectors[chosen[0]]).sum(axis=1).astype(np.float64)
    while len(chosen) < clusters:
        total = distance.sum()
        weights = distance / total if total > 0 else np.full(len(vectors), 1 / len(vectors))
        chosen.append(int(np.searchsorted(np.cumsum(weights), rng.random()).clip(0, len(vectors) - 1)))
        distance = np.minimum(distance, np.square(vectors - vectors[chosen[-1]]).sum(axis=1))
    return vectors[chosen].astype(np.float32)


def _balanced_assignment(similarity: Floats) -> Ids:
    """Assigns each row to the cluster of highest similarity minus price. Prices rise until no cluster is too large."""
    rows, clusters = similarity.shape
    max_size = max(1.0, MAX_LOAD_FACTOR * rows / clusters)
    price = np.zeros(clusters, np.float32)
    assignment: Ids = similarity.argmax(axis=1)
    for _ in range(_MAX_PRICE_UPDATES):
        sizes = np.bincount(assignment, minlength=clusters)
        if sizes.max() <= max_size:
            break
        price += np.float32(_PRICE_STEP) * np.maximum(sizes / max_size - 1, 0).astype(np.float32)
        assignment = (similarity - price).argmax(axis=1)
    return assignment
