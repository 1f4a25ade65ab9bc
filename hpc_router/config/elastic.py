"""Experts whose number of replicas follows the demand, and the limits of that number."""

from collections.abc import Mapping

from hpc_router.config.adapters import host_of
from hpc_router.config.schema import ExpertConfig


def is_elastic(expert: ExpertConfig) -> bool:
    """Returns whether the number of the expert's replicas follows the demand."""
    low, high = replica_limits(expert)
    return low < high


def on_demand(experts: Mapping[str, ExpertConfig]) -> frozenset[str]:
    """Returns the experts that get a replica when a request comes, with the adapters on their engines."""
    return frozenset(name for name in experts if is_elastic(experts[host_of(experts, name)]))


def replica_limits(expert: ExpertConfig) -> tuple[int, int]:
    """Returns the minimum and maximum number of replicas."""
    low = expert.replicas if expert.min_replicas is None else expert.min_replicas
    high = expert.replicas if expert.max_replicas is None else expert.max_replicas
    return low, high
