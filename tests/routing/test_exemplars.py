"""What training makes of exemplars, and which exemplars it refuses."""

from string import ascii_lowercase

import numpy as np
import pytest

from hpc_router.errors import ConfigError
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.exemplars import train
from tests.routing.samples import EXEMPLARS, artefact


def test_each_expert_gets_a_cluster_of_its_name() -> None:
    made = artefact()
    assert made.clusters == made.experts == ("code", "math", "medicine")
    assert made.method == "exemplars"


def test_every_exemplar_is_decided_for_its_expert() -> None:
    classifier = Classifier(artefact())
    for name, prompts in EXEMPLARS.items():
        for prompt in prompts:
            assert classifier.classify(prompt).expert == name


def test_the_order_of_the_experts_does_not_matter() -> None:
    turned = train(dict(reversed(EXEMPLARS.items())))
    assert turned.version == artefact().version


def test_other_prompts_are_another_fingerprint() -> None:
    other = train({**EXEMPLARS, "math": ["What is 1 + 1?"]})
    assert other.training["data"] != artefact().training["data"]


def test_a_prompt_listed_twice_and_blank_ones_count_once_and_not_at_all() -> None:
    again = {**EXEMPLARS, "math": [*EXEMPLARS["math"], "", "  \n", EXEMPLARS["math"][0]]}
    assert train(again).version == artefact().version


def test_the_threshold_lies_below_nearly_all_right_margins() -> None:
    """One in twenty of the exemplars decided rightly when left out may fall below it."""
    rng = np.random.default_rng(0)
    topics = {name: [f"{letter}{name}" for letter in ascii_lowercase] for name in ("x", "y")}
    shared = [f"{letter}z" for letter in ascii_lowercase]
    exemplars = {
        name: [" ".join([*rng.choice(own, 4), *rng.choice(shared, 8)]) for _ in range(40)]
        for name, own in topics.items()
    }
    made = train(exemplars)
    scores = made.training["scores"]
    assert isinstance(scores, dict)
    assert scores["left_out_accuracy"] > 0.9
    assert 0 < made.margin_threshold < 1
    assert 0.03 < scores["low_margin_share"] < 0.15


def test_one_exemplar_each_is_enough_to_train() -> None:
    """Left out, such an expert knows nothing, so no margin can be learnt and none is demanded."""
    made = train({"a": ["sorting algorithms"], "b": ["blood pressure"]})
    assert made.margin_threshold == 0.0
    assert Classifier(made).classify("high pressure").expert == "b"


def test_words_that_most_experts_share_are_not_telling() -> None:
    made = artefact()
    telling = dict(zip(made.terms, made.telling.tolist(), strict=True))
    assert telling["what"] == 0
    assert telling["derivative"] == 1


@pytest.mark.parametrize(
    ("exemplars", "message"),
    [
        ({}, "at least two experts, not 0"),
        ({"a": ["some text"]}, "at least two experts, not 1.*model_field"),
        ({"a": ["some text"], "b": []}, "expert 'b' has no usable exemplar"),
        ({"a": ["some text"], "b": ["", " \n"]}, "expert 'b' has no usable exemplar.*fallback"),
        ({"a": ["some text"], "b": "not a list"}, "expert 'b' must be a list"),
        ({"a": ["some text"], "b": None}, "expert 'b' must be a list"),
        ({"a": ["some text"], "b": ["x", 3]}, "exemplar 1 of expert 'b' is of type int"),
        (
            {"a": ["x", "Same  Text"], "b": ["same text"]},
            "exemplar 0 of expert 'b' reads like exemplar 1 of expert 'a'",
        ),
    ],
    ids=str,
)
def test_exemplars_that_cannot_be_learnt_from_are_named(exemplars: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(exemplars)
