"""Elastic experts, whose number of replicas follows the demand, and the limits of that number."""

from collections.abc import Mapping

from hpc_router.config.adapters import host_of
from hpc_router.config.schema import ExpertConfig


def is_elastic(expert: ExpertConfig) -> bool:
    """Returns whether the expert's number of replicas follows the demand: its minimum is less than its maximum."""
    low, high = replica_limits(expert)
    return low < high


def on_demand(experts: Mapping[str, ExpertConfig]) -> frozenset[str]:
    """Returns the names of the elastic experts, and of the adapters on their engines. Without a replica, such an expert
    gets one when a request for it comes."""
    return frozenset(name for name in experts if is_elastic(experts[host_of(experts, name)]))


def replica_limits(expert: ExpertConfig) -> tuple[int, int]:
    """Returns the expert's minimum and maximum number of replicas. A limit that is not set equals `replicas`."""
    low = expert.replicas if expert.min_replicas is None else expert.min_replicas
    high = expert.replicas if expert.max_replicas is None else expert.max_replicas
    return low, high
