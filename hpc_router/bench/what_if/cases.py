"""The deployments that a prediction compares: every combination of the values of overrides such as `topology=a,b`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hpc_router.cluster.control_loop.desired_state import desired_of, with_desired_counts
from hpc_router.cluster.control_loop.forecast import read_estimates
from hpc_router.cluster.control_loop.handover import Durations
from hpc_router.cluster.planning.run_target import find_target, with_requested
from hpc_router.config.parsing import is_text, type_at
from hpc_router.config.schema import Deployment
from hpc_router.config.sources import parse_override


@dataclass(frozen=True, slots=True)
class Case:
    """One deployment. `name`: the overrides in which it differs from the other cases. `durations`: measured times of
    its run's jobs by expert; empty without a run."""

    name: str
    deployment: Deployment
    durations: Mapping[str, Durations]


def find_cases(given: Path | None, overrides: Sequence[str], *, config_dir: Path | None = None) -> list[Case]:
    """Returns a case for each combination. `given`: the run directory that the user named; overrides then change its
    config, and its measured times count. Raises ConfigError."""
    values = [_values(text) for text in overrides]
    cases = []
    for chosen in product(*values):
        different = [text for text, all_of in zip(chosen, values, strict=True) if len(all_of) > 1]
        deployment, durations = _found(given, chosen, config_dir)
        cases.append(Case(" ".join(different) or _name(deployment, chosen), deployment, durations))
    return cases


def _name(deployment: Deployment, overrides: Sequence[str]) -> str:
    topologies = [text for text in overrides if text.startswith("topology=")]
    return topologies[-1] if topologies else deployment.name


def _found(
    given: Path | None, overrides: Sequence[str], config_dir: Path | None
) -> tuple[Deployment, Mapping[str, Durations]]:
    named = os.environ.get("HPC_ROUTER_RUN")
    path = given or (Path(named) if named else None)
    if path is None or not (path / "config.yaml").exists():
        target = find_target(path, overrides, config_dir=config_dir)
        return target.deployment, {} if target.run is None else read_estimates(target.run)
    target = find_target(path, [])
    assert target.run is not None
    deployment = with_desired_counts(target.deployment, desired_of(target.run, target.deployment))
    if overrides or config_dir is not None:
        deployment = with_requested(deployment, overrides, config_dir=config_dir)
    return deployment, read_estimates(target.run)


def _values(text: str) -> list[str]:
    """Returns the override once for each of its values; unchanged, if it is no choice of several values, or if its key
    takes a text, in which a comma is part of the value."""
    override = parse_override(text)
    kind = type_at(Deployment, override.key_or_group.split("."))
    if not override.is_sweep_override() or kind is Any or is_text(kind):
        return [text]
    return [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
