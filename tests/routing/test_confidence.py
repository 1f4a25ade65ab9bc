"""Calibrated probabilities of decisions, and the measures of such probabilities."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hpc_router.cli.classify import evaluate
from hpc_router.config.compose import load_deployment
from hpc_router.errors import ConfigError
from hpc_router.routing.artefact import read
from hpc_router.routing.confidence import Calibration, auroc, calibrate, expected_calibration_error
from hpc_router.routing.training.train import TrainConfig, train
from tests.routing.samples import EXEMPLARS, artefact
from tests.routing.training.samples import prompts, write_jsonl


def decisions(count: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins, scores and rightness, drawn from log-odds of -1 + 8 margin + 2 score."""
    rng = np.random.default_rng(0)
    margins, scores = rng.random(count), rng.random(count)
    right = rng.random(count) < 1 / (1 + np.exp(1 - 8 * margins - 2 * scores))
    return margins, scores, right


def test_the_calibration_recovers_the_probability() -> None:
    margins, scores, right = decisions()
    found = calibrate(margins, scores, right)
    assert found is not None
    assert (found.bias, found.by_margin, found.by_score) == pytest.approx((-1, 8, 2), abs=0.7)
    stated = [found.probability(m, s) for m, s in zip(margins, scores, strict=True)]
    assert expected_calibration_error(stated, right.tolist()) < 0.02


def test_neither_margin_nor_score_counts_against_a_decision() -> None:
    margins, scores, right = decisions()
    found = calibrate(margins, -scores, right)
    assert found is not None
    assert found.by_score == 0
    assert found.by_margin > 0
    none = calibrate(-margins, -scores, right)
    assert none is not None
    assert none.probability(0.5, 0.5) == pytest.approx(right.mean(), abs=0.01)


def test_a_few_decisions_that_are_all_right_are_no_proof_of_certainty() -> None:
    assert calibrate(np.ones(9), np.ones(9), np.ones(9, np.bool_)) is None
    found = calibrate(np.linspace(0, 1, 12), np.linspace(0, 1, 12), np.ones(12, np.bool_))
    assert found is not None
    assert 0.8 < found.probability(1.0, 1.0) < 0.99


def test_the_weight_of_a_decision_counts() -> None:
    margins, right = np.tile([0.0, 1.0], 50), np.repeat([True, False], 50)
    weight = np.where(right, 9.0, 1.0)
    found = calibrate(margins, np.zeros(100), right, weight=weight)
    assert found is not None
    assert found.probability(0.5, 0.0) == pytest.approx(0.9, abs=0.02)


def test_a_probability_never_overflows() -> None:
    extreme = Calibration(bias=0.0, by_margin=1e6, by_score=0.0)
    assert extreme.probability(2.0, 0.0) == 1.0
    assert extreme.probability(-2.0, 0.0) == pytest.approx(0.0)


def test_auroc_and_calibration_error_match_their_definitions() -> None:
    rng = np.random.default_rng(0)
    higher, lower = rng.integers(0, 8, 60), rng.integers(0, 6, 40)
    labels = [1] * 60 + [0] * 40
    assert auroc(higher.tolist(), lower.tolist()) == pytest.approx(roc_auc_score(labels, [*higher, *lower]))
    assert expected_calibration_error([0.25] * 4 + [1.0], [True, False, False, False, True]) == pytest.approx(0.0)
    assert expected_calibration_error([0.9, 0.9], [True, False]) == pytest.approx(0.4)


def test_exemplars_give_a_calibration_that_survives_writing(tmp_path: Path) -> None:
    trained = artefact()
    assert trained.calibration is not None
    assert trained.calibration.by_margin >= 0
    trained.write(tmp_path / "a")
    assert read(tmp_path / "a").calibration == trained.calibration
    with pytest.raises(ValueError, match="not finite"):
        dataclasses.replace(trained, calibration=Calibration(bias=float("nan"), by_margin=0.0, by_score=0.0))


def test_prompts_of_other_sources_lower_the_threshold_and_the_confidence(tmp_path: Path) -> None:
    """In the validation prompts, half of the labels are wrong, so the decisions are less certain."""
    rows = prompts(each=40)
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    other = [{"prompt": f"{row['prompt']} indeed", "domain": row["domain"]} for row in prompts(each=20, seed=3)]
    for row, wrong in zip(other[::2], [*other[1::2], other[1]], strict=False):
        row["domain"] = wrong["domain"]
    validation = write_jsonl(tmp_path / "validation.jsonl", [*other, rows[0]])
    config = TrainConfig(data=str(data), output="x", method="exemplars", features="lexical")
    plain = train(config, progress=lambda *_: None)
    config.validation = str(validation)
    validated = train(config, progress=lambda *_: None)
    assert validated.training["data"]["validation"] == 60  # type: ignore[index]  # without the prompt of the training
    assert validated.tables == plain.tables  # the validation changes no weight
    assert validated.margin_threshold <= plain.margin_threshold
    assert plain.calibration is not None
    assert validated.calibration is not None
    assert validated.calibration.probability(0.5, 0.5) < plain.calibration.probability(0.5, 0.5)
    with pytest.raises(ConfigError, match="needs method=exemplars"):
        train(dataclasses.replace(config, method="discovered", clusters=3), progress=lambda *_: None)


def test_eval_reports_calibration_and_prompts_of_no_domain(tmp_path: Path) -> None:
    artefact().write(tmp_path / "a")
    rows = [{"prompt": text, "domain": name} for name, texts in EXEMPLARS.items() for text in texts]
    result = evaluate(tmp_path / "a", write_jsonl(tmp_path / "own.jsonl", rows), costs={})
    assert 0 <= result["confidence"]["ece"] < 0.5
    assert "auroc" not in result["confidence"]
    strange = [{"prompt": f"zebra {n} gnu", "domain": "none"} for n in range(5)]
    result = evaluate(tmp_path / "a", write_jsonl(tmp_path / "all.jsonl", [*rows, *strange]), costs={})
    assert result["confidence"]["auroc"] == 1.0


def test_confidence_and_margin_exclude_each_other() -> None:
    assert load_deployment(["topology=sim", "policy.min_confidence=0.6"]).policy.min_confidence == 0.6
    with pytest.raises(ConfigError, match=r"policy\.min_confidence=0\.6 and policy\.margin=0\.1 both say"):
        load_deployment(["topology=sim", "policy.min_confidence=0.6", "policy.margin=0.1"])
