"""Makes the number of replicas follow the demand: reads the demand that the routers measure, lets `elasticity` decide,
and writes `elastic.json` and the events. Only the leading control loop does this.

Without a measurement, for example while no router runs, nothing changes.
"""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Final

from hpc_router.cluster.control_loop.desired_state import scaled_times
from hpc_router.cluster.control_loop.elastic_states import elastic_policies, read_states, write_states
from hpc_router.cluster.control_loop.elasticity import Demand, ElasticState, Expert, Supply, decide
from hpc_router.cluster.control_loop.handover import Due, Durations
from hpc_router.cluster.control_loop.reconcile import Desired
from hpc_router.cluster.control_loop.slots import Observed, Slot
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.config.schema import Deployment
from hpc_router.state.demand import ExpertDemand, RouterDemand, read_demand
from hpc_router.state.run_directory import RunDir

BY: Final = "control loop"
SOON_PASSES: Final = 3
"""A handover that is due within this many passes is due soon."""


class ElasticCounts:
    """Keeps the numbers of replicas of one run's elastic experts."""

    def __init__(self, run: RunDir, deployment: Deployment) -> None:
        self._run, self._deployment = run, deployment
        self._written: Mapping[str, ElasticState] = {}

    def blocked(self) -> set[str]:
        """Returns the experts that have fewer replicas than their demand needs, because of cluster.max_gpus."""
        return {name for name, state in self._written.items() if state.blocked is not None}

    def update(
        self,
        desired: Desired,
        observed: Observed,
        routers: Iterable[str],
        handovers: Mapping[str, Due],
        durations: Mapping[str, Durations],
        *,
        failed: Collection[Slot] = (),
    ) -> None:
        """Decides on the number of replicas of each elastic expert from its present demand. Writes `elastic.json`, and
        an event for each number that changes. `desired`: the present desired state; `routers`: names of the live
        routers; `failed`: the slots that are given up."""
        demand = read_demand(self._run, routers) if desired.elastic else None
        if demand is None:
            return
        policies = elastic_policies(self._deployment, desired.replicas)
        before = read_states(self._run, policies, scaled_times(self._run.read_desired()))
        now, soon_s = time.time(), SOON_PASSES * self._deployment.cluster.reconcile_s
        experts = {
            name: Expert(
                policies[name],
                state if state.changed_at else replace(state, changed_at=now),
                _demand(demand, name),
                replace(
                    _supply(name, state.replicas, observed, handovers, durations, soon_at=now + soon_s),
                    failed=tuple(Slot(name, str(number)) in failed for number in range(state.replicas)),
                ),
            )
            for name, state in before.items()
            if name in demand.experts
        }
        decided = before | decide(experts, now, free_gpus=_free_gpus(desired, set(policies)))
        for name, state in decided.items():
            if state.replicas != before[name].replicas:
                counts = {"replicas": state.replicas, "before": before[name].replicas}
                self._run.event("scaled", expert=name, replica=None, reason=state.reason, by=BY, **counts)
        if decided != self._written:
            self._written = decided
            write_states(self._run, decided, at=now)


def is_idle(demand: RouterDemand | None, idle_s: float, *, since: float, now: float) -> bool:
    """Returns whether the run had no request for `idle_s` seconds, and `since` is at least as long ago. Returns False
    if there is no measurement of the demand."""
    if demand is None or any(d.in_flight or d.waiting for d in demand.experts.values()):
        return False
    times = [at for d in demand.experts.values() if (at := d.last_request_at) is not None]
    return now - max([since, *times]) >= idle_s


def _demand(demand: RouterDemand, name: str) -> Demand:
    own = demand.experts.get(name, ExpertDemand())
    return Demand(own.in_flight, own.waiting, own.wait_s, own.last_request_at)


def _supply(
    name: str,
    replicas: int,
    observed: Observed,
    handovers: Mapping[str, Due],
    durations: Mapping[str, Durations],
    *,
    soon_at: float,
) -> Supply:
    slots = [observed.get(Slot(name, str(number)), ()) for number in range(replicas)]
    last = [a for a in (slots[-1] if slots else ()) if a.ready and not a.stop_requested]
    ends_soon = any(a.replica in handovers and handovers[a.replica].due_at <= soon_at for a in last)
    ready = tuple(any(a.ready and not a.stop_requested for a in attempts) for attempts in slots)
    return Supply(ready, until_ready_s=durations.get(name, Durations()).until_ready_s, ends_soon=ends_soon)


def _free_gpus(desired: Desired, elastic: set[str]) -> int | None:
    """Returns the number of GPUs that all experts in `elastic` may have together; None without a limit."""
    if desired.max_gpus is None:
        return None
    fixed = {name: count for name, count in desired.replicas.items() if name not in elastic}
    if desired.router:
        fixed[ROUTER] = 1
    return desired.max_gpus - sum(desired.gpus.get(name, 0) * count for name, count in fixed.items())
