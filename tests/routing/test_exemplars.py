"""Training from exemplars, and the exemplars that it refuses."""

from string import ascii_lowercase

import numpy as np
import pytest

from hpc_router.errors import ConfigError
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.exemplars import train
from tests.routing.samples import EXEMPLARS, artefact


def test_each_expert_gets_a_cluster_of_its_name() -> None:
    trained = artefact()
    assert trained.clusters == trained.experts == ("code", "math", "medicine")
    assert trained.method == "exemplars"


def test_every_exemplar_is_classified_as_its_expert() -> None:
    classifier = Classifier(artefact())
    for name, prompts in EXEMPLARS.items():
        for prompt in prompts:
            assert classifier.classify(prompt).expert == name


def test_the_order_of_the_experts_does_not_matter() -> None:
    turned = train(dict(reversed(EXEMPLARS.items())))
    assert turned.version == artefact().version


def test_other_prompts_give_another_fingerprint() -> None:
    other = train({**EXEMPLARS, "math": ["What is 1 + 1?"]})
    assert other.training["data"] != artefact().training["data"]


def test_repeated_prompts_count_once_and_blank_prompts_are_ignored() -> None:
    again = {**EXEMPLARS, "math": [*EXEMPLARS["math"], "", "  \n", EXEMPLARS["math"][0]]}
    assert train(again).version == artefact().version


def test_the_threshold_lies_below_most_margins_of_correct_predictions() -> None:
    """About 5 % of the held-out exemplars that are classified correctly fall below it."""
    rng = np.random.default_rng(0)
    topics = {name: [f"{letter}{name}" for letter in ascii_lowercase] for name in ("x", "y")}
    shared = [f"{letter}z" for letter in ascii_lowercase]
    exemplars = {
        name: [" ".join([*rng.choice(own, 4), *rng.choice(shared, 8)]) for _ in range(40)]
        for name, own in topics.items()
    }
    trained = train(exemplars)
    scores = trained.training["scores"]
    assert isinstance(scores, dict)
    assert scores["left_out_accuracy"] > 0.9
    assert 0 < trained.margin_threshold < 1
    assert 0.03 < scores["low_margin_share"] < 0.15


def test_one_exemplar_each_is_enough_to_train() -> None:
    """A held-out exemplar leaves its expert without any, so there are no margins, and the threshold is 0."""
    trained = train({"a": ["sorting algorithms"], "b": ["blood pressure"]})
    assert trained.margin_threshold == 0.0
    assert Classifier(trained).classify("high pressure").expert == "b"


def test_words_that_most_experts_share_are_not_discriminative() -> None:
    trained = artefact()
    discriminative = dict(zip(trained.terms, trained.discriminative.tolist(), strict=True))
    assert discriminative["what"] == 0
    assert discriminative["derivative"] == 1


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
            "exemplar 0 of expert 'b' has the same terms as exemplar 1 of expert 'a'",
        ),
    ],
    ids=str,
)
def test_an_error_names_unusable_exemplars(exemplars: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(exemplars)
