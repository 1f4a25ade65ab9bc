"""Computes revisions: hashes of the part of the config that a job reads. While its revision is unchanged, a job need
not be replaced.

A job reads the config once, at its start. Values that only the control loop and the commands use (replica counts,
handover, intervals) are left out of the hash, because they apply without a new job.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, Final

from hpc_router import __version__
from hpc_router.config.adapters import adapters_of, hosts
from hpc_router.config.schema import Deployment

ROUTER: Final = "router"
_NOT_OF_JOBS: Final = frozenset(
    {
        "handover",
        "handover_margin_s",
        "ask_s",
        "reconcile_s",
        "max_failures",
        "keep_generations",
        "keep_days",
        "login",
        "replicas_per_job",
        "max_gpus",
    }
)
"""Keys of `cluster` that no job reads."""
_NOT_OF_AGENTS: Final = frozenset(
    {
        *("replicas", "min_replicas", "max_replicas", "idle_s"),
        *("description", "exemplars", "handover", "max_in_flight"),
    }
)
"""Keys of an expert that its agent does not read."""
_ROUTED: Final = ("model", "adapter_of", "capacity", "max_in_flight")
"""Keys of an expert that the router reads."""


def revisions(deployment: Deployment) -> dict[str, str]:
    """Returns the revision of each expert that has jobs of its own, and of the router."""
    return {name: revision(deployment, name) for name in (ROUTER, *hosts(deployment.experts))}


def revision(deployment: Deployment, expert: str) -> str:
    """Returns the revision of the jobs of `expert`: an expert with jobs of its own, or the router."""
    cluster = _without(asdict(deployment.cluster), _NOT_OF_JOBS)
    experts = {name: asdict(config) for name, config in deployment.experts.items()}
    if expert == ROUTER:
        return _digest(cluster, asdict(deployment.router), asdict(deployment.policy), _routed(experts))
    adapters = adapters_of(deployment.experts, expert)
    return _digest(cluster, _without(experts[expert], _NOT_OF_AGENTS), adapters)


def _routed(experts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: {key: expert[key] for key in _ROUTED} for name, expert in experts.items()}


def _without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _digest(*parts: Any) -> str:
    """Returns a hash of `parts` and the package's version. A job of another version therefore has another revision and
    is replaced."""
    return hashlib.sha256(json.dumps([__version__, *parts], sort_keys=True).encode()).hexdigest()[:16]
