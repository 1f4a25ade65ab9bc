"""Soft clusters: the run-time choice, and its agreement with the formula of the training."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.errors import ArtefactError, ConfigError
from hpc_router.routing.artefact import read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.quality import Quality
from hpc_router.routing.soft_scores import SoftScores
from hpc_router.routing.training.soft_clusters import expected_scores
from tests.routing.samples import SOFT, artefact, edit, soft_artefact

RATES_OF_TWO = {cluster: [0, 1] for cluster in artefact().clusters}
VALUES = st.lists(st.floats(-2, 2), min_size=1, max_size=9)


def quality(clusters: int, experts: int, *, seed: int = 0) -> Quality:
    rng = np.random.default_rng(seed)
    names = tuple(f"e{number}" for number in range(experts))
    return Quality(experts=names, rate=rng.random((clusters, experts)), cost=np.arange(experts, dtype=np.float64))


@given(VALUES, st.integers(1, 5), st.floats(0.1, 3))
def test_the_choice_is_that_of_the_training(values: list[float], experts: int, length: float) -> None:
    known = quality(len(values), experts)
    scores = SoftScores(known, SOFT, experts=None, cost_weight=None)
    expected = expected_scores(np.array([values]) / length, known.rate, sharpness=SOFT.sharpness)[0]
    choice = scores.choose(list(values), length)
    assert choice.score == pytest.approx(expected.max(), abs=1e-9)
    assert expected[known.experts.index(str(choice.expert))] == pytest.approx(expected.max(), abs=1e-9)
    assert list(scores.expected(values, length).values()) == pytest.approx(expected.tolist(), abs=1e-9)
    if experts == 1:
        assert choice.margin is None
    else:
        second = np.sort(expected)[-2]
        assert choice.margin == pytest.approx(expected.max() - second, abs=1e-9)
        assert choice.runner_up not in (None, choice.expert)


def test_only_experts_of_the_deployment_are_chosen() -> None:
    known = quality(3, 4)
    chosen = SoftScores(known, SOFT, experts=("e1", "other"), cost_weight=None).choose([0.1, 0.5, 0.2], 1.0)
    assert (chosen.expert, chosen.margin, chosen.runner_up) == ("e1", None, None)
    assert SoftScores(known, SOFT, experts=("other",), cost_weight=None).choose([0.1, 0.5, 0.2], 1.0).expert is None


def test_a_higher_weight_of_the_cost_prefers_the_cheap_expert() -> None:
    prompt = "Write a Python function that sorts a list of integers."
    trained = soft_artefact()
    assert Classifier(trained).classify(prompt).expert == "big"
    assert Classifier(trained, cost_weight=0.9).classify(prompt).expert == "small"
    cheaper = soft_artefact(soft=dataclasses.replace(SOFT, cost_weight=0.9))
    assert Classifier(cheaper).classify(prompt).expert == "small"
    assert Classifier(cheaper, cost_weight=0.0).classify(prompt).expert == "big"


def test_the_weight_of_the_cost_also_moves_a_table_of_experts() -> None:
    prompt = "Write a Python function that sorts a list of integers."
    table = soft_artefact(soft=None, experts=("big", "small", "small"))
    assert Classifier(table).classify(prompt).expert == "big"
    assert Classifier(table, cost_weight=0.9).classify(prompt).expert == "small"
    assert Classifier(table, cost_weight=0.0).experts == ("big", "small", "small")
    with pytest.raises(ConfigError, match=r"policy\.cost_weight: the artefact .* has no measured quality"):
        Classifier(artefact(), cost_weight=0.1)


def test_a_decision_names_the_nearest_cluster_and_the_terms_that_count() -> None:
    classifier = Classifier(soft_artefact())
    decided = classifier.classify("a Python function with an integer")
    assert (decided.cluster, decided.expert, decided.runner_up) == ("code", "big", "small")
    assert decided.margin is not None
    assert 0 < decided.margin < 0.7
    terms = {term.term: term.weight for term in classifier.explain("a Python function with an integer")}
    assert terms["python"] > 0


def test_a_soft_artefact_survives_writing_and_reading(tmp_path: Path) -> None:
    trained = soft_artefact()
    trained.write(tmp_path / "a")
    stored = read(tmp_path / "a")
    assert stored.soft == SOFT
    assert stored.version == trained.version != artefact().version
    text = "Is asthma inherited?"
    assert Classifier(stored).classify(text) == Classifier(trained).classify(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {}}, r"need training\.quality"),
        ({"training": {"quality": {"experts": ["a"], "cost": [0], "rate": {}}}}, "not complete"),
        ({"training": {"quality": {"experts": ["a"], "cost": [0], "rate": RATES_OF_TWO}}},
         "3 clusters x 1 experts"),
        ({"soft": dataclasses.replace(SOFT, sharpness=0.0)}, "positive sharpness"),
        ({"soft": dataclasses.replace(SOFT, nearest=0)}, "nearest of 1 or more"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_artefact(**changes)


def test_a_manifest_with_a_broken_section_is_refused(tmp_path: Path) -> None:
    soft_artefact().write(tmp_path / "a")
    edit(tmp_path / "a", soft={"sharpness": "high", "nearest": 4, "cost_weight": 0})
    with pytest.raises(ArtefactError, match=r"soft\.sharpness must be a number"):
        read(tmp_path / "a")
