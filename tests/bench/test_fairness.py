"""The options, the percentiles and the report of `hpc-router bench fairness`."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hpc_router.bench.fairness import TOPOLOGY, FairnessOptions, FairnessResults, Latencies
from hpc_router.config.compose import load_deployment
from hpc_router.config.schema import SimOptions, options_of
from hpc_router.errors import ConfigError


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"flood": 0}, {"flood": 4001}, {"rate": 0.5}, {"workers": 65}])
def test_invalid_options_name_the_valid_range(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"--{name} .*: between 1 and"):
        FairnessOptions(out=Path(), **wrong).checked()  # type: ignore[arg-type]
    assert FairnessOptions(out=Path()).checked().flood == 2000


def test_percentiles_and_ratio() -> None:
    alone = Latencies.of(np.arange(101) / 1000)
    assert alone == Latencies(101, 50.0, 99.0, 100.0)
    behind = dataclasses.replace(alone, p99_ms=108.9)
    results = FairnessResults(
        FairnessOptions(out=Path("/x")), alone, alone, 7, alone, behind, 3, "2026-01-02T03:04:05Z"
    )  # fmt: skip
    value = json.loads(json.dumps(results.to_json()))
    assert (value["ratio"], value["options"]["out"], value["starts_of_a"]) == (1.1, "/x", 7)
    text = results.markdown()
    assert "| interactive first token before 2000 batch requests | 101 | 50 | 108.9 | 100 |" in text
    assert "is 1.10 of that without. Meanwhile 7 requests of A and 3 batch requests" in text


def test_its_deployment_limits_batch_requests_on_an_engine_with_priority() -> None:
    deployment = load_deployment([f"topology={TOPOLOGY}"])
    assert deployment.router.classes.batch.max_in_flight is not None
    options = options_of("batched", deployment.experts["batched"].engine)
    assert isinstance(options, SimOptions)
    assert options.extra["scheduling-policy"] == "priority"
    fixed = options_of("fixed", deployment.experts["fixed"].engine)
    assert isinstance(fixed, SimOptions)
    assert (fixed.ttft_ms, fixed.itl_ms, fixed.extra["jitter"]) == (500, 0, 0)
