"""Directions of labels in a sentence encoder's space, for `method=exemplars`.

An encoder's vectors contain more than the topic, such as the style of a data set. With descriptions, the direction of a
label is the mean of its prompts plus its description, which names the topic whatever the style of the prompts is.
Without descriptions, it is halfway between that mean and the direction that separates the label best from the others.
"""

from typing import Final

import numpy as np

from hpc_router.routing.features import Doubles, Floats, Ids

RIDGE: Final = 1.0
"""Strength of the ridge regularisation in `discriminant_directions`."""
DESCRIPTION_WEIGHT: Final = 1.0
"""Weight of a description, where the mean of the label's prompts has the weight 1.

Chosen on held-out prompts of the training's sources and on labelled prompts of another source.
"""


def label_directions(vectors: Floats, labels: Ids, *, descriptions: Floats | None, count: int) -> Floats:
    """Returns the unit direction of each label: count x dimensions.

    `vectors`: prompts x dimensions. `labels`: label of each vector. `descriptions`: count x dimensions, zeros for a
    label without a description; None if there are no descriptions.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    sums = np.zeros((count, vectors.shape[1]))
    np.add.at(sums, labels, vectors - mean)
    means = unit(sums)
    if descriptions is None:
        return unit(means + discriminant_directions(vectors, labels, clusters=count)).astype(np.float32)
    described = descriptions.any(axis=1, keepdims=True)
    offsets = np.where(described, unit(descriptions - mean), 0.0)
    return unit(means + DESCRIPTION_WEIGHT * offsets).astype(np.float32)


def discriminant_directions(vectors: Floats, assignment: Ids, *, clusters: int) -> Floats:
    """Returns for each cluster the unit direction that best separates its vectors from the others; zeros if there is
    none.

    The directions come from a ridge regression of cluster membership on the centred vectors. As RIDGE grows, they
    approach the means.
    """
    membership = np.eye(clusters)[assignment]
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    gram = centred.T @ centred + RIDGE * np.eye(centred.shape[1])
    directions = np.linalg.solve(gram, centred.T @ (membership - membership.mean(axis=0))).T
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    return directions.astype(np.float32)


def unit(rows: Doubles) -> Doubles:
    """Returns the rows scaled to length one; rows of zeros stay as they are."""
    scaled: Doubles = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return scaled
