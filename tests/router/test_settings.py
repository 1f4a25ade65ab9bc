"""What `desired.json` changes."""

from typing import Any

import pytest

from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, PolicyConfig
from hpc_router.errors import ConfigError
from hpc_router.router.settings import LIVE, scaled_to_zero, value_at, with_desired

WITH_ADAPTER = Deployment(
    experts={
        "base": ExpertConfig(model="m", engine=EngineConfig(kind="sim")),
        "law": ExpertConfig(model="a", adapter_of="base"),
        "math": ExpertConfig(model="m", engine=EngineConfig(kind="sim")),
    },
    policy=PolicyConfig(kind="model_field"),
)


def test_keys_of_a_section_in_a_section_can_be_set() -> None:
    desired = {"settings": {"router.classes.batch.max_in_flight": "4", "router.classes.interactive.weight": 3}}
    changed = with_desired(WITH_ADAPTER, desired)
    assert value_at(changed, "router.classes.batch.max_in_flight") == 4
    assert (changed.router.classes.interactive.weight, changed.router.classes.batch.weight) == (3, 1)
    assert "router.resources.cpus" not in LIVE
    for key, value, text in (
        ("router.classes.bach.weight", 1, "did you mean 'router.classes.batch.weight'"),
        ("router.classes", {}, "apply"),
        ("router.classes.batch.max_in_flight", 0, "out of range"),
    ):
        with pytest.raises(ConfigError, match=text):
            with_desired(WITH_ADAPTER, {"settings": {key: value}})


def test_an_adapter_is_scaled_with_its_host() -> None:
    assert scaled_to_zero(with_desired(WITH_ADAPTER, {"replicas": {"base": 0}})) == {"base": "base", "law": "base"}


@pytest.mark.parametrize(
    "counts", [None, [], "x", {"base": "0"}, {"base": None}, {"base": False}, {"law": 0}, {"x": 0}, {"base": 2}]
)
def test_other_values_scale_nothing_to_zero(counts: Any) -> None:
    assert scaled_to_zero(with_desired(WITH_ADAPTER, {"replicas": counts})) == {}
