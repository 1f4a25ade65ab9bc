"""What `desired.json` changes."""

from typing import Any

import pytest

from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, PolicyConfig
from hpc_router.router.settings import scaled_to_zero, with_desired

WITH_ADAPTER = Deployment(
    experts={
        "base": ExpertConfig(model="m", engine=EngineConfig(kind="sim")),
        "law": ExpertConfig(model="a", adapter_of="base"),
        "math": ExpertConfig(model="m", engine=EngineConfig(kind="sim")),
    },
    policy=PolicyConfig(kind="model_field"),
)


def test_an_adapter_is_scaled_with_its_host() -> None:
    assert scaled_to_zero(with_desired(WITH_ADAPTER, {"replicas": {"base": 0}})) == {"base": "base", "law": "base"}


@pytest.mark.parametrize(
    "counts", [None, [], "x", {"base": "0"}, {"base": None}, {"base": False}, {"law": 0}, {"x": 0}, {"base": 2}]
)
def test_other_values_scale_nothing_to_zero(counts: Any) -> None:
    assert scaled_to_zero(with_desired(WITH_ADAPTER, {"replicas": counts})) == {}
