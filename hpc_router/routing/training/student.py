"""The `distilled` feature space: a linear student that predicts a sentence encoder's vectors from terms.

A ridge regression maps the TF-IDF row of a text to the encoder's vector. The student learns from the prompts, from an
optional corpus, and from each single word of the encoder's vocabulary. These words let it place prompts that have no
word in common with the training prompts. If there are few texts, it also learns from variants of the prompts and from
groups of words. The mean vector of each kind of text is subtracted, because it says nothing about the domain (for
example, all single words lie close to each other).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Final

import numpy as np

from hpc_router.routing.features import Doubles, Features, Floats, Ids, Mask, Vocabulary, counts_of
from hpc_router.routing.training.encoder import ProgressCallback, Teacher
from hpc_router.routing.training.feature_spaces import frequent_vocabulary, smooth_idf, tfidf_rows
from hpc_router.routing.training.ridge import ridge_regression
from hpc_router.routing.training.topics import read_topics, texts_of

RIDGE: Final = 1.0
WORD_WEIGHT: Final = 1.0
WORD_WEIGHT_OF_FEW: Final = 0.5
"""Weight of a single word if there are fewer than ENOUGH_TEXTS texts."""
LABEL_WEIGHT: Final = 0.1
"""Weight of an exemplar's label, relative to the encoder's cosines."""
ENOUGH_TEXTS: Final = 2000
GROUPS_PER_VARIANT: Final = 4
MAX_WEIGHT: Final = 16.0
"""Maximum weight of a text. If there are fewer than ENOUGH_TEXTS texts, each weighs more than 1, to balance the single
words."""
MAX_VARIANT_WORDS: Final = 12


@dataclass(kw_only=True)
class Student:
    """The `distilled` space: the training texts with their encoder vectors, from which `fold` computes weights. Row i
    of `rows`, `targets`, `weight` and `source` belongs to text i. The prompts come first."""

    vocabulary: Vocabulary
    idf: Doubles
    vectors: Floats
    rows: Any
    """Sparse TF-IDF matrix, texts x terms."""
    targets: Floats
    """The encoder's vectors minus the mean for that kind of text: texts x dimensions."""
    weight: Doubles
    """Square root of the weight of each text in the regression."""
    source: Ids
    """Index of the training prompt that the text is, or is a variant of; -1 for other texts."""
    encoder: str
    """Fingerprint of the encoder."""
    labels: Ids | None = None
    """Label of each training prompt, as column number; None if no labels are learnt."""
    descriptions: Floats | None = None
    """The encoder's vector of each label's description, labels x dimensions, zeros for a label without one; None if no
    label has one."""
    topics: Floats | None = None
    """The encoder's vectors of `topics.texts_of(read_topics())`, texts x dimensions; None without descriptions."""
    spherical: bool = True
    dimensions: Floats | None = None

    def fold(self, directions: Floats, *, held_out: Mask | None = None) -> Floats:
        """Returns weights, terms x directions. Their sum over a text's terms predicts the scalar product of the
        direction and the encoder's vector of the text. `held_out`: prompts that must not influence them."""
        from scipy import sparse

        weight = self.weight.copy()
        if held_out is not None:
            weight[np.append(held_out, np.False_)[self.source]] = 0
        targets = self.targets @ directions.T
        if self.labels is not None:
            membership = np.eye(len(directions), dtype=np.float32)[self.labels]
            targets[: len(membership)] += LABEL_WEIGHT * (membership - membership.mean(axis=0))
        targets = (targets * weight[:, None]).astype(np.float32)
        solution = ridge_regression(sparse.diags_array(weight) @ self.rows, targets, strength=RIDGE)
        return (solution * self.idf[:, None]).astype(np.float32)


def distilled(
    texts: Sequence[str],
    *,
    corpus: Sequence[str],
    encoder: Teacher,
    seed: int,
    progress: ProgressCallback,
    descriptions: Sequence[str] = (),
) -> Student:
    """Encodes all training texts and returns them as a space, whose `fold` later solves the regression.

    `descriptions`: one text per label, empty for a label without a description.
    """
    from scipy import sparse

    words, given = encoder.words(), [*texts, *corpus]
    missing = max(ENOUGH_TEXTS - len(given), 0)
    numbered = variants(texts, words, count=missing, seed=seed)
    variant_texts = [text for _, text in numbered]
    groups = word_groups(words, count=GROUPS_PER_VARIANT * missing, seed=seed)
    generated = [*variant_texts, *groups, *words]
    stages = {"prompts": texts, "corpus": corpus, "variants": variant_texts, "word groups": groups, "words": words}
    encoded = [encoder.encode(part, stage=stage, progress=progress) for stage, part in stages.items() if part]
    vocabulary = frequent_vocabulary([*given, *generated], features=Features(), min_texts=1)
    counts = counts_of(given, vocabulary=vocabulary)
    idf = smooth_idf(counts)
    # The regression uses TF-IDF rows; `fold` multiplies the idf into the weights afterwards.
    generated_rows = tfidf_rows(counts_of(generated, vocabulary=vocabulary), idf)
    rows = sparse.vstack([tfidf_rows(counts, idf), generated_rows]).tocsr()
    weight = np.ones(rows.shape[0])
    weight[: len(given)] = np.sqrt(min(max(ENOUGH_TEXTS / len(given), 1.0), MAX_WEIGHT))
    weight[len(given) + len(numbered) + len(groups) :] = np.sqrt(WORD_WEIGHT_OF_FEW if missing else WORD_WEIGHT)
    source = np.full(rows.shape[0], -1)
    source[: len(texts)] = np.arange(len(texts))
    source[len(given) : len(given) + len(numbered)] = [number for number, _ in numbered]
    described = _encoded_descriptions(descriptions, encoder, progress)
    topics = texts_of(read_topics()) if described is not None else []
    return Student(
        vocabulary=vocabulary,
        idf=idf,
        vectors=encoded[0],
        rows=rows,
        targets=np.vstack([part - part.mean(axis=0) for part in encoded]),
        weight=weight,
        source=source,
        encoder=encoder.fingerprint(),
        descriptions=described,
        topics=encoder.encode(topics, stage="topics", progress=progress) if topics else None,
    )


def _encoded_descriptions(descriptions: Sequence[str], encoder: Teacher, progress: ProgressCallback) -> Floats | None:
    given = [text for text in descriptions if text]
    if not given:
        return None
    encoded = encoder.encode(given, stage="descriptions", progress=progress)
    vectors = np.zeros((len(descriptions), encoded.shape[1]), np.float32)
    vectors[[bool(text) for text in descriptions]] = encoded
    return vectors


def word_groups(words: Sequence[str], *, count: int, seed: int) -> list[str]:
    """Returns `count` texts of two to four random words each."""
    rng = random.Random(seed)
    return [" ".join(rng.sample(words, min(len(words), rng.randint(2, 4)))) for _ in range(count)]


def variants(texts: Sequence[str], words: Sequence[str], *, count: int, seed: int) -> list[tuple[int, str]]:
    """Returns `count` variants of the texts, each with the number of its text.

    A variant consists of a run of the text's words and at most as many random ones of `words`, in shuffled order.
    """
    rng = random.Random(seed)
    made = []
    for number in islice(cycle(range(len(texts))), count):
        tokens = texts[number].split()
        length = min(len(tokens), rng.randint(1, MAX_VARIANT_WORDS))
        start = rng.randint(0, len(tokens) - length)
        mixed = tokens[start : start + length] + rng.sample(words, min(len(words), rng.randint(0, length)))
        rng.shuffle(mixed)
        made.append((number, " ".join(mixed)))
    return made
