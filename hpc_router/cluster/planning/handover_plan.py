"""Plans how each expert and the router hand over at the end of their walltime, for `plan`. Pure.

The mode is the configured one, unless the site has no GPUs for one more replica. Times come from earlier jobs of the
run, and are unknown if there are none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpc_router.cluster.control_loop.desired_state import handover_policies
from hpc_router.cluster.control_loop.handover import Durations, HandoverPolicy, before_drain_s
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.launchers.slurm.node_fit import can_overlap, configured_at, resources_of
from hpc_router.cluster.launchers.slurm.sinfo import SlurmSite
from hpc_router.config.schema import Deployment, HandoverMode
from hpc_router.config.walltime import walltime_s


@dataclass(frozen=True, slots=True)
class HandoverPlan:
    """How one expert or the router hands over. `gap_s`: expected seconds without a ready replica at the end of a
    walltime, if there is only one replica. `gpu_minutes`: GPU time that is used twice while the old and the new job of
    a replica overlap. Each is None if it is not known. `why`: the reason for this mode."""

    expert: str
    mode: HandoverMode
    why: str
    gap_s: float | None
    gpu_minutes: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "expert": self.expert,
            "mode": self.mode,
            "why": self.why,
            "gap_s": self.gap_s,
            "gpu_minutes": self.gpu_minutes,
        }

    def text(self) -> str:
        waits = "drain and load" if self.mode == "drain_first" else "drain, queue and load"
        gap = "no gap" if self.gap_s == 0 else f"a gap of its {waits} time"
        if self.gap_s:
            gap = f"a gap of about {self.gap_s:.0f} s"
        cost = "" if self.gpu_minutes is None else f", {self.gpu_minutes:.1f} GPU-minutes for both jobs at once"
        return f"{self.expert}: {self.mode} ({self.why}): {gap}{cost}"


def handover_plans(
    deployment: Deployment, durations: Mapping[str, Durations], site: SlurmSite | None
) -> list[HandoverPlan]:
    """Returns the plans of the router and of all experts with jobs of their own; no plans if jobs have no walltime.
    `durations`: measured times by expert. `site`: Slurm's partitions; None if not known."""
    return [
        _plan(deployment, name, policy, durations.get(name), site)
        for name, policy in handover_policies(deployment).items()
    ]


def _plan(
    deployment: Deployment, name: str, policy: HandoverPolicy, known: Durations | None, site: SlurmSite | None
) -> HandoverPlan:
    at, resources = resources_of(deployment, name)
    own = None if name == ROUTER else deployment.experts[name].handover
    mode, why = policy.mode, f"{'cluster' if own is None else f'experts.{name}'}.handover"
    if mode == "overlap" and name != ROUTER and site is not None and not can_overlap(deployment, site, name):
        mode, why = "drain_first", "the site has no GPUs for one replica more"
    load_s = max(known.load_s, default=None) if known is not None else None
    gap_s = (
        None if known is None else (0.0 if mode == "none" else -max(known.queue_s, default=0.0)) + known.until_ready_s
    )
    gpu_minutes = None
    if mode == "overlap":
        gap_s = 0.0
        if load_s is not None:
            gpu_minutes = resources.total_gpus * (load_s + policy.margin_s + before_drain_s(policy)) / 60
        key, walltime = configured_at(at, resources, deployment.cluster, "walltime")
        life_s = None if walltime is None else walltime_s(walltime)
        if life_s is not None and life_s / 2 < before_drain_s(policy) + policy.margin_s + (load_s or 0.0):
            why += f"; {key}={walltime} is so short that it hands over after half of it"
    return HandoverPlan(name, mode, why, gap_s, gpu_minutes)
