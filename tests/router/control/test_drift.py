"""How far prompts are from those of the training."""

import pytest

from hpc_router.router.control.drift import drift

TRAINING = {"scores": {"cluster_share": {"a": 0.5, "b": 0.5}, "low_margin_share": 0.1}}


def test_the_same_mix_is_no_drift() -> None:
    counted = [(("v", "a", "classified"), 5), (("v", "b", "low_margin"), 3), (("v", "b", "out_of_domain"), 2)]
    found = drift(counted, artefact="v", training=TRAINING)
    assert found is not None
    assert (found.cluster_distance, found.low_margin_share, found.trained_low_margin_share) == (0, 0.5, 0.1)
    assert [family.name for family in found.gauges()] == [
        "hpc_router_drift_cluster_distance",
        "hpc_router_drift_low_margin_share",
        "hpc_router_drift_trained_low_margin_share",
    ]


def test_prompts_of_nowhere_are_all_drift() -> None:
    found = drift([(("v", "", "no_known_terms"), 3)], artefact="v", training=TRAINING)
    assert found is not None
    assert found.cluster_distance == pytest.approx(1)


def test_what_another_artefact_decided_does_not_count() -> None:
    assert drift([(("old", "a", "classified"), 5)], artefact="v", training=TRAINING) is None


def test_an_artefact_that_says_nothing_of_its_training_has_no_distance() -> None:
    found = drift([(("v", "a", "classified"), 5)], artefact="v", training={})
    assert found is not None
    assert found.cluster_distance is None
