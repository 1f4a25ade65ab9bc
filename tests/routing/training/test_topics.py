"""Topics that are the domain of no expert: the packaged ones, and what they change in a training."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hpc_router.routing.artefact import Artefact, read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.policy import ClassifierPolicy, RouteReason
from hpc_router.routing.training import student
from hpc_router.routing.training import train as train_module
from hpc_router.routing.training.topics import Topic, read_topics, texts_of, topic_groups
from hpc_router.routing.training.train import TrainConfig, train
from tests.routing.training.encoders import WordSums
from tests.routing.training.samples import SHARED, WORDS, prompts, write_jsonl

DESCRIPTIONS = {"astronomy": "star planet galaxy", "cooking": "oven recipe sauce", "sailing": "mast rudder keel"}
GAMES, MUSIC = "chess dice poker rook", "violin opera chord flute"
TOPICS = [
    Topic("leisure", GAMES, ("the rook chess", "poker and dice")),
    Topic("leisure", MUSIC, ("the violin opera", "a chord flute")),
    Topic("home", "oven recipe sauce flour", ("bake butter sauce", "garlic pepper oven")),
]


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, topics: list[Topic]) -> Artefact:
    words = [*SHARED, *(word for own in WORDS.values() for word in own), *f"{GAMES} {MUSIC}".split()]
    monkeypatch.setattr(train_module, "Encoder", lambda source: WordSums(words, dimensions=64))
    for module in (train_module, student):
        monkeypatch.setattr(module, "read_topics", lambda: topics)
    data = write_jsonl(folder / "data.jsonl", prompts())
    (folder / "d.yaml").write_text("".join(f"{name}: {text}\n" for name, text in DESCRIPTIONS.items()))
    config = TrainConfig(data=str(data), output="x", method="exemplars", features="distilled", encoder="words")
    config.descriptions = str(folder / "d.yaml")
    return train(config, progress=lambda *_: None)


def test_the_packaged_topics_are_complete() -> None:
    topics = read_topics()
    texts = texts_of(topics)
    assert len(texts) == len(set(texts)) == len(topics) + sum(len(topic.questions) for topic in topics)
    assert texts[: len(topics)] == [topic.about for topic in topics]
    assert all(len(topic.questions) >= 3 for topic in topics)
    assert len(Counter(topic.group for topic in topics)) <= 5, (
        "each group costs a column of the table, and 1 % of a decision"
    )


def test_a_group_is_the_mean_of_its_topics_that_are_close_to_no_label() -> None:
    axes = np.eye(4)
    vectors = np.array([*axes[[0, 1, 2]], *np.repeat(axes[[0, 1, 2]], 2, axis=0)], np.float32)
    labels = axes[[2, 3]].astype(np.float32)
    found = topic_groups(TOPICS, vectors, mean=np.zeros(4, np.float32), labels=labels)
    assert found is not None
    assert found.names == ("leisure",)
    assert found.directions == pytest.approx(np.array([[0.5**0.5, 0.5**0.5, 0, 0]]))
    assert found.questions == (*TOPICS[0].questions, *TOPICS[1].questions)
    everything = axes.astype(np.float32)
    assert topic_groups(TOPICS, vectors, mean=np.zeros(4, np.float32), labels=everything) is None


def test_prompts_of_a_topic_go_to_the_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = trained(tmp_path, monkeypatch, TOPICS)
    assert artefact.topics == ("leisure",), "the other is the domain of an expert"
    artefact.write(tmp_path / "stored")
    classifier = Classifier(read(tmp_path / "stored"))
    policy = ClassifierPolicy(classifier, fallback="generalist")
    without = Classifier(trained(tmp_path, monkeypatch, []))
    assert artefact.calibration is not None
    for text in ("poker dice rook star", "the violin flute chord sail"):
        result, before = classifier.classify(text), without.classify(text)
        assert result.expert == before.expert, "the expert is the same"
        assert result.margin is not None
        assert result.margin < 0 < (before.margin or 0)
        assert artefact.calibration.probability(result.margin, result.score) < 0.5
        shown = policy.explain(text, ready={}).to_dict(id=1)
        assert (shown["expert"], shown["reason"], shown["topic"]) == ("generalist", RouteReason.LOW_MARGIN, "leisure")
    for row in prompts(seed=1):
        own = classifier.classify(str(row["prompt"]))
        assert classifier.nearest_topic(str(row["prompt"])) is None
        assert (own.expert, own.margin is not None and own.margin > 0) == (row["domain"], True)
