"""Topics that are the domain of no expert: how near is a prompt to them?

The labels of a training alone do not tell what belongs to none of them: a question on history may resemble `law` more
than any other label, by a clear margin. So the artefact also has the directions of some general topics, which no prompt
is ever sent to. They lower the margin and the score of a prompt that is nearer to them than to its label.

`topics.yaml` describes many topics in a few groups. A topic that is close to a label is left out, because it may be
that label's domain. The direction of a group is the mean of its remaining topics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import yaml

from hpc_router.routing.features import Floats
from hpc_router.routing.training.label_directions import unit

CLOSE: Final = 0.4
"""Cosine to the direction of a label from which a topic counts as close to it."""
_FILE: Final = Path(__file__).with_name("topics.yaml")


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic of the file."""

    group: str
    about: str
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TopicGroups:
    """The topics that are close to no label. `directions`: unit directions, groups x dimensions. `questions`: the
    prompts of all their topics."""

    names: tuple[str, ...]
    directions: Floats
    questions: tuple[str, ...]


@cache
def read_topics() -> tuple[Topic, ...]:
    """Returns the topics of the file."""
    groups = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return tuple(
        Topic(name, each["about"], tuple(each["questions"])) for name, topics in groups.items() for each in topics
    )


def texts_of(topics: Sequence[Topic]) -> list[str]:
    """Returns the descriptions and then the questions of the topics."""
    return [*(topic.about for topic in topics), *(question for topic in topics for question in topic.questions)]


def topic_groups(topics: Sequence[Topic], vectors: Floats, *, mean: Floats, labels: Floats) -> TopicGroups | None:
    """Returns the groups of the topics that are close to no label; None if none is left.

    `vectors`: the encoder's vectors of `texts_of(topics)`, texts x dimensions. `mean`: the mean vector of the training
    prompts. `labels`: unit directions, labels x dimensions.
    """
    offsets = vectors.astype(np.float64) - mean
    about, asked = offsets[: len(topics)], offsets[len(topics) :]
    owner = np.repeat(np.arange(len(topics)), [len(topic.questions) for topic in topics])
    sums = np.zeros_like(about)
    np.add.at(sums, owner, asked)
    directions = unit(unit(about) + unit(sums))
    far = (directions @ labels.T).max(axis=1) < CLOSE
    kept = [number for number in range(len(topics)) if far[number]]
    names = tuple(dict.fromkeys(topics[number].group for number in kept))
    if not names:
        return None
    of_groups = np.zeros((len(names), directions.shape[1]))
    np.add.at(of_groups, [names.index(topics[number].group) for number in kept], directions[kept])
    questions = tuple(question for number in kept for question in topics[number].questions)
    return TopicGroups(names, unit(of_groups).astype(np.float32), questions)
