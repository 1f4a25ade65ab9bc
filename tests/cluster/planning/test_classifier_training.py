"""What the classifier of `up` is trained from, with and without a sentence encoder beside it."""

from pathlib import Path

import pytest

from hpc_router.cluster.planning import classifier_training
from hpc_router.cluster.planning.plan import make_plan
from hpc_router.config.compose import load_deployment
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError
from hpc_router.routing.training import encoder, train


@pytest.fixture
def sim() -> Deployment:
    return load_deployment(["topology=sim"])


def with_encoder(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    monkeypatch.setattr(classifier_training, "installed_encoder", lambda: folder)


def test_without_an_encoder_the_plan_says_that_descriptions_are_not_read(
    sim: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_encoder(monkeypatch, None)
    text = make_plan(sim, ask_engines=False).classifier
    assert text is not None
    assert "exemplars alone" in text
    assert "hpc-router[train]" in text
    artefact = classifier_training.trained_classifier(sim, progress=lambda *_: None)
    assert artefact.method == "exemplars"
    assert artefact.experts == ("code", "law", "math", "medicine")


def test_with_an_encoder_the_descriptions_of_the_experts_with_exemplars_are_used(
    sim: Deployment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_encoder(monkeypatch, tmp_path)
    calls: dict[str, object] = {}

    def train_exemplars(exemplars: object, **options: object) -> None:
        calls.update(options, exemplars=exemplars)

    monkeypatch.setattr(train, "train_exemplars", train_exemplars)
    classifier_training.trained_classifier(sim, progress=lambda *_: None)
    assert calls["encoder"] == str(tmp_path)
    descriptions = calls["descriptions"]
    assert isinstance(descriptions, dict)
    assert sorted(descriptions) == ["code", "law", "math", "medicine"]  # the generalist has no exemplars
    assert descriptions["law"] == sim.experts["law"].description
    assert encoder.ENCODER_PACKAGE in str(make_plan(sim, ask_engines=False).classifier)


def test_a_cost_weight_without_measured_quality_is_a_fault() -> None:
    with pytest.raises(ConfigError, match=r"policy\.cost_weight=0\.5: the classifier has no measured quality"):
        make_plan(load_deployment(["topology=sim", "policy.cost_weight=0.5"]), ask_engines=False)


def test_a_confidence_that_nothing_gives_is_a_fault() -> None:
    few = ["topology=sim", *(f"experts.{name}.exemplars=[one {name} text]" for name in ("code", "law", "math"))]
    few += ["experts.medicine.exemplars=[]", "policy.min_confidence=0.5"]
    with pytest.raises(ConfigError, match=r"policy\.min_confidence=0\.5: .* needs 10 exemplars"):
        make_plan(load_deployment(few), ask_engines=False)
    make_plan(load_deployment(["topology=sim", "policy.min_confidence=0.5"]), ask_engines=False)


@pytest.mark.parametrize("override", ["policy=round_robin", "policy.artefact=somewhere"])
def test_nothing_is_trained_where_no_classifier_is_needed(override: str) -> None:
    deployment = load_deployment(["topology=sim", override])
    assert classifier_training.training_text(deployment) is None


def test_the_encoder_is_not_used_unless_all_that_it_needs_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_NEEDED_MODULES", ("numpy", "no_such_module"))
    assert encoder.installed_encoder() is None
