"""Counts the GPU time of each expert by the state of its replicas, and the tokens that their engines generate. Only the
leading control loop does this.

A pass adds the time since the previous pass, in the states that the replicas have now. If no loop ran for a while, at
most MAX_GAP_S is added. The routers read the engines' tokens; those that an engine generates after it was last read are
not counted.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from hpc_router.cluster.control_loop.slots import Attempt, Observed, all_attempts
from hpc_router.cluster.launchers.interface import ROUTER, JobState
from hpc_router.errors import RegistryError
from hpc_router.state.atomic_files import read_json, replace_json
from hpc_router.state.demand import RouterDemand
from hpc_router.state.gpu_hours import ExpertUsage, GpuState, Usage, parse_usage
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

MAX_GAP_S: Final = 60.0
WRITE_S: Final = 10.0
"""Minimum interval in seconds between writes of the file."""


def held_now(
    observed: Observed, gpus: Mapping[str, int], in_flight: Mapping[str, int]
) -> dict[str, dict[GpuState, int]]:
    """Returns the number of GPUs that each expert holds now, by the state of the replicas. Pure. `gpus`: GPUs of one
    replica by expert. `in_flight`: requests in flight by replica."""
    held: dict[str, dict[GpuState, int]] = {}
    for attempt in all_attempts(observed):
        count = gpus.get(attempt.slot.expert, 0)
        if count and attempt.slot.expert != ROUTER and attempt.job in (JobState.RUNNING, JobState.ENDING):
            states = held.setdefault(attempt.slot.expert, {})
            state = _state(attempt, in_flight.get(attempt.replica, 0))
            states[state] = states.get(state, 0) + count
    return held


def _state(attempt: Attempt, in_flight: int) -> GpuState:
    if attempt.stop_requested or attempt.draining_at is not None or attempt.job is JobState.ENDING:
        return GpuState.DRAINING
    if not attempt.ready:
        return GpuState.STARTING
    return GpuState.BUSY if in_flight else GpuState.IDLE


class GpuHours:
    """Counts the usage of one run and writes it to `gpu_hours.json`. The first update continues from that file."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._usage: Usage | None = None
        self._written_at = 0.0

    def update(self, observed: Observed, gpus: Mapping[str, int], demand: RouterDemand | None, now: float) -> None:
        """Adds what was used since the last update. `gpus`: GPUs of one replica by expert; `now`: Unix seconds."""
        usage = self._usage or _read(self._run, now)
        held = held_now(observed, gpus, {} if demand is None else demand.replicas)
        seconds = min(max(0.0, now - usage.at), MAX_GAP_S)
        experts = dict(usage.experts)
        for name, states in held.items():
            experts[name] = experts.get(name, ExpertUsage()).plus(states, seconds)
        for name, own in ({} if demand is None else demand.experts).items():
            before = experts.get(name, ExpertUsage())
            times = [at for at in (before.last_request_at, own.last_request_at) if at is not None]
            experts[name] = replace(before, last_request_at=max(times, default=None))
        usage = Usage(now, experts, usage.seen)
        if demand is not None:
            usage = with_tokens(usage, demand.tokens)
        self._usage = usage
        if now - self._written_at >= WRITE_S:
            self._written_at = now
            replace_json(self._run.gpu_hours_json, usage.to_json())


def with_tokens(usage: Usage, counted: Mapping[str, int]) -> Usage:
    """Returns `usage` with the tokens added that engines have generated since they were last asked. `counted`: by
    replica, the tokens since its engine's start; a smaller number than before means that the engine was restarted. A
    replica that is not in `counted` is forgotten if its successor is."""
    experts, seen = dict(usage.experts), dict(usage.seen)
    for replica, count in counted.items():
        before = seen.get(replica, 0)
        more = count - before if count >= before else count
        name = split_replica(replica)[0]
        own = experts.get(name, ExpertUsage())
        experts[name] = replace(own, tokens=(own.tokens or 0) + more)
        slot = replica.rpartition(".")[0]
        for older in [other for other in seen if other.rpartition(".")[0] == slot and other not in counted]:
            del seen[older]
        seen[replica] = count
    return Usage(usage.at, experts, seen)


def _read(run: RunDir, now: float) -> Usage:
    content = read_json(run.gpu_hours_json)
    try:
        return Usage(now) if content is None else parse_usage(content)
    except RegistryError as error:
        logger.warning("the GPU hours are counted from now on: %s", error)
        return Usage(now)
