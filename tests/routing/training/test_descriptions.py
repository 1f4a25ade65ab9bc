"""Descriptions of labels: where they are read from, and what they change in a training with an encoder."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from hpc_router.errors import ConfigError
from hpc_router.routing.artefact import Artefact
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.training import student
from hpc_router.routing.training import train as train_module
from hpc_router.routing.training.descriptions import read_descriptions, read_exemplars
from hpc_router.routing.training.label_directions import label_directions
from hpc_router.routing.training.train import TrainConfig, train, train_exemplars
from tests.routing.training.encoders import WordSums
from tests.routing.training.samples import SHARED, WORDS, prompts, write_jsonl
from tests.support.needs import ROOT

LABELS = {"law", "math"}
# Words that no prompt contains; the encoder knows them, so the student does, too.
DESCRIPTIONS = {"astronomy": "zodiac quasar", "cooking": "casserole", "sailing": "regatta spinnaker"}


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that knows the prompts' words only, and no topics."""
    for module in (train_module, student):
        monkeypatch.setattr(module, "read_topics", list)
    words = [*SHARED, *(word for own in WORDS.values() for word in own), *" ".join(DESCRIPTIONS.values()).split()]
    monkeypatch.setattr(train_module, "Encoder", lambda source: WordSums(words, dimensions=64))


@pytest.mark.parametrize(
    "text",
    [
        "law: courts\nmath: sums\nother: x\n",
        '{"law": {"description": "courts"}, "math": " sums ", "empty": ""}',
        "experts:\n  law: {description: courts, model: m}\n  math: {description: sums, model: m}\n  none: {model: m}\n",
    ],
)
def test_a_file_maps_labels_or_experts_to_descriptions(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.yaml").write_text(text)
    assert read_descriptions(tmp_path / "d.yaml", labels=LABELS) == {"law": "courts", "math": "sums"}


def test_a_folder_has_one_expert_per_file() -> None:
    found = read_descriptions(ROOT / "conf" / "expert", labels={*LABELS, "unknown"})
    assert sorted(found) == ["law", "math"]
    assert found["math"].startswith("Mathematics: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other: x\n", r"it describes none of the labels law, math"),
        ("- a\n", "not a mapping"),
        ("law: 3\n", r"'law' is of type int; a description must be text"),
        ("law: [\n", r"d\.yaml:2: not valid YAML"),
        (None, "No such file"),
    ],
)
def test_an_error_says_what_is_wrong_with_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_descriptions(tmp_path / "d.yaml", labels=LABELS)


def test_a_label_lies_between_its_prompts_and_its_description() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    vectors = (rng.normal(0, 0.05, (40, 4)) + np.eye(4)[labels]).astype(np.float32)
    described = np.array([[0, 0, 1, 0], [0, 0, 0, 0]], np.float32)
    directions = label_directions(vectors, labels, descriptions=described, count=2)
    assert np.linalg.norm(directions, axis=1) == pytest.approx([1, 1])
    assert directions[0, 0] > 0.2
    assert directions[0, 2] > 0.3
    assert abs(directions[1, 2]) < 0.1  # a label without a description lies at its prompts


@pytest.mark.usefixtures("encoder")
def test_a_prompt_that_has_only_words_of_a_description_goes_to_its_label(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", prompts())
    (tmp_path / "d.yaml").write_text("".join(f"{name}: {text}\n" for name, text in DESCRIPTIONS.items()))
    config = TrainConfig(data=str(data), output="x", method="exemplars", features="distilled", encoder="words")
    config.descriptions = str(tmp_path / "d.yaml")
    artefact = train(config, progress=lambda *_: None)
    assert artefact.training["descriptions"] == DESCRIPTIONS
    assert str(tmp_path) not in str(artefact.training)
    classifier = Classifier(artefact)
    for name, text in DESCRIPTIONS.items():
        for word in text.split():
            assert classifier.classify(f"{word} {word}").expert == name
    right = [classifier.classify(str(row["prompt"])).expert == row["domain"] for row in prompts(seed=1)]
    assert np.mean(right) > 0.9


def test_exemplars_are_read_beside_the_descriptions(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(
        "experts:\n  law: {description: courts, exemplars: [May I sue, ' ']}\n  math: {description: sums}\n"
        "  other: {description: x, exemplars: [y]}\n"
    )
    assert read_exemplars(tmp_path / "d.yaml", labels=LABELS) == [("law", "May I sue")]
    packaged = read_exemplars(ROOT / "conf" / "expert", labels=LABELS)
    assert {name for name, _ in packaged} == LABELS
    assert len(packaged) >= 40


@pytest.mark.usefixtures("encoder")
def test_exemplars_beside_the_descriptions_set_the_threshold(tmp_path: Path) -> None:
    """They are prompts of another source than the data, so fewer right decisions on other sources count as low."""
    data = write_jsonl(tmp_path / "data.jsonl", prompts())

    def trained(exemplars: dict[str, list[str]]) -> Artefact:
        lines = (
            f"{name}: {{description: {text}, exemplars: {exemplars.get(name, [])}}}\n"
            for name, text in DESCRIPTIONS.items()
        )
        (tmp_path / "d.yaml").write_text("".join(lines))
        config = TrainConfig(data=str(data), output="x", method="exemplars", features="distilled", encoder="words")
        config.descriptions = str(tmp_path / "d.yaml")
        return train(config, progress=lambda *_: None)

    # Prompts of which each has one word of its label and several that all labels share.
    hard = {name: [f"{word} {' '.join(SHARED[:4])}" for word in words[:6]] for name, words in WORDS.items()}
    without, few, given = trained({}), trained({name: texts[:1] for name, texts in hard.items()}), trained(hard)
    assert few.margin_threshold == without.margin_threshold
    assert (few.training["data"]["validation"], given.training["data"]["validation"]) == (0, 18)  # type: ignore[index]
    assert given.margin_threshold < without.margin_threshold
    assert (given.weights == without.weights).all()


@pytest.mark.usefixtures("encoder")
def test_exemplars_of_experts_are_trained_with_their_descriptions() -> None:
    exemplars = {name: [f"{a} {b}" for a, b in itertools.pairwise(words)] for name, words in WORDS.items()}
    artefact = train_exemplars(exemplars, descriptions=DESCRIPTIONS, encoder="words", progress=lambda *_: None)
    assert artefact.experts == tuple(sorted(WORDS))
    assert Classifier(artefact).classify("a regatta").expert == "sailing"


def test_descriptions_without_an_encoder_are_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", prompts())
    config = TrainConfig(data=str(data), output="x", method="exemplars", features="lexical", descriptions="d.yaml")
    with pytest.raises(ConfigError, match="needs method=exemplars and features=distilled"):
        train(config, progress=lambda *_: None)
