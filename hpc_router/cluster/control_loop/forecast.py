"""Expected times of the deployment, in two files of the run directory that only the leading control loop writes.

`estimates.json` has the measured times of each expert's jobs. `forecast.json` says when an expert without a ready
replica will have one, and lists the handovers that are due or in progress. The router reads them for Retry-After, and
`status` and `why` show them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from hpc_router.cluster.control_loop.handover import Due, Durations
from hpc_router.cluster.control_loop.reconcile import refusal
from hpc_router.cluster.control_loop.slots import Attempt, Observed, all_attempts
from hpc_router.cluster.launchers.interface import JobState
from hpc_router.state.atomic_files import read_json, replace_json
from hpc_router.state.run_directory import RunDir

_SAMPLES: Final = ("queue_s", "load_s", "drain_s")
REFRESH_S: Final = 30.0
"""Maximum interval in seconds between writes of `forecast.json`. A recent file shows readers that its writer is
alive."""


@dataclass(frozen=True, slots=True)
class ExpectedReady:
    """The time at which a replica is expected to be ready (Unix seconds). `ready_at` is None if the time is unknown;
    `reason` says why the replica is not ready yet. `replica`: None if it has no job yet; `until_ready_s` is then the
    expected seconds from its submission until it is ready."""

    ready_at: float | None
    replica: str | None
    reason: str | None
    until_ready_s: float | None = None


@dataclass(frozen=True, slots=True)
class PlannedHandover:
    """The handover of `replica`, which is due or in progress. `late_s`: expected seconds without a serving replica;
    None if unknown or zero. `reason`: why the successor waits. `refused`: Slurm's message if it refused to run the
    successor at the same time as `replica`; `mode` then differs from the configured one."""

    replica: str
    mode: str
    due_at: float
    expires_at: float
    successor: str | None = None
    ready_at: float | None = None
    late_s: float | None = None
    reason: str | None = None
    refused: str | None = None


def forecast(
    observed: Observed, due: Mapping[str, Due], durations: Mapping[str, Durations], now: float
) -> tuple[dict[str, ExpectedReady], list[PlannedHandover], list[ExpectedReady]]:
    """Returns three values: when each expert without a ready replica will have one; the handovers that are due; and the
    expected times of all replicas that are not ready yet. Pure. `due`: the handovers by replica, from
    `handover.schedule`. `durations`: measured times by expert."""
    expected: dict[str, ExpectedReady] = {}
    starting: list[ExpectedReady] = []
    ready = {slot.expert for slot, attempts in observed.items() if any(a.ready for a in attempts)}
    for slot, attempts in sorted(observed.items()):
        newest = next((a for a in reversed(attempts) if a.live and not a.stop_requested), None)
        if newest is None or newest.ready:
            continue
        found = _expected(newest, durations.get(slot.expert, Durations()), now)
        starting.append(found)
        if slot.expert in ready:
            continue
        before = expected.get(slot.expert)
        if before is None or (found.ready_at is not None and found.ready_at < (before.ready_at or float("inf"))):
            expected[slot.expert] = found
    handovers = [_planned(observed, a, due[a.replica], durations, now) for a in _handing_over(observed, due, now)]
    return expected, handovers, starting


def _handing_over(observed: Observed, due: Mapping[str, Due], now: float) -> list[Attempt]:
    """Returns the live attempts whose handover is due."""
    attempts = [a for slot in sorted(observed) for a in observed[slot] if a.live]
    return [a for a in attempts if a.replica in due and now >= due[a.replica].due_at]


def _planned(
    observed: Observed, job: Attempt, due: Due, durations: Mapping[str, Durations], now: float
) -> PlannedHandover:
    """Returns the handover of one job, with the expected time of its successor."""
    newer = [a for a in observed[job.slot] if a.generation > job.generation]
    refused = refusal(newer) if due.mode == "overlap" else None
    planned = PlannedHandover(
        job.replica,
        due.mode if refused is None else "drain_first",
        round(due.due_at, 1),
        due.expires_at,
        refused=refused.message if refused is not None else None,
    )
    known = durations.get(job.slot.expert, Durations())
    successor = next((a for a in reversed(newer) if a.live), None)
    if planned.mode != "overlap":
        gap_s = round(max(known.drain_s, default=0.0) + max(known.load_s, default=0.0), 1)
        name = successor.replica if successor is not None else None
        return replace(planned, successor=name, ready_at=round(due.drains_at + gap_s, 1), late_s=gap_s or None)
    if successor is None:
        return planned
    found = _expected(successor, known, now)
    late_s = None if found.ready_at is None else round(max(0.0, found.ready_at - due.drains_at), 1) or None
    return replace(planned, successor=found.replica, ready_at=found.ready_at, late_s=late_s, reason=found.reason)


def _expected(attempt: Attempt, known: Durations, now: float) -> ExpectedReady:
    """Returns when this attempt will be ready: the start of its job plus the measured load time. For a job that waits
    in Slurm's queue, the start is Slurm's estimate; without one, it follows from the measured queue times. `ready_at`
    is None if the result is a time that has passed."""
    if attempt.ready:
        return ExpectedReady(attempt.ready_at, attempt.replica, None)
    load_s, pending = max(known.load_s, default=0.0), attempt.job is JobState.PENDING
    starts_at = attempt.started_at
    if pending:
        queue_s = max(known.queue_s, default=0.0)
        starts_at = attempt.report.starts_at or (attempt.submitted_at or attempt.claimed_at) + queue_s
    ready_at = None if starts_at is None else round(starts_at + load_s, 1)
    reason = attempt.report.pending_reason if pending else attempt.progress.phase.value if attempt.progress else None
    return ExpectedReady(ready_at if ready_at is not None and ready_at > now else None, attempt.replica, reason)


def not_submitted(
    experts: Mapping[str, str], observed: Observed, durations: Mapping[str, Durations]
) -> dict[str, ExpectedReady]:
    """Returns a forecast for each expert in `experts` that has no live job. Pure. `experts`: the experts that may have
    none, each with the reason."""
    live = {a.slot.expert for a in all_attempts(observed) if a.live and not a.stop_requested}
    known = {expert: durations.get(expert, Durations()) for expert in experts}
    return {
        expert: ExpectedReady(None, None, reason, round(known[expert].until_ready_s, 1) or None)
        for expert, reason in experts.items()
        if expert not in live
    }


class ForecastFiles:
    """Writes `estimates.json` and `forecast.json`. `handovers`: the handovers that the last `write` found."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._estimates: dict[str, Any] | None = None
        self._forecast: dict[str, Any] | None = None
        self._written_at = 0.0
        self.handovers: Sequence[PlannedHandover] = ()

    def write(
        self,
        observed: Observed,
        due: Mapping[str, Due],
        durations: Mapping[str, Durations],
        partitions: Mapping[str, str],
        now: float,
        *,
        absent: Mapping[str, str],
        adapters: Mapping[str, str],
    ) -> None:
        """Writes those of the two files whose content has changed. `partitions`: the configured partition of each
        expert. `absent`: reason by expert, for experts that may have no live job. `adapters`: the host of each
        adapter."""
        estimates = {
            "experts": {
                expert: {partitions.get(expert, ""): {k: [round(s, 2) for s in v] for k, v in asdict(known).items()}}
                for expert, known in sorted(durations.items())
            }
        }
        if estimates != self._estimates:
            self._estimates = estimates
            replace_json(self._run.estimates_json, estimates)
        expected, handovers, starting = forecast(observed, due, durations, now)
        self.handovers = handovers
        expected = not_submitted(absent, observed, durations) | expected
        expected |= {adapter: expected[host] for adapter, host in adapters.items() if host in expected}
        content = {
            "experts": {expert: asdict(found) for expert, found in expected.items()},
            "handovers": [asdict(planned) for planned in handovers],
            "starting": [asdict(found) for found in starting],
        }
        since_s = time.monotonic() - self._written_at
        if content != self._forecast or since_s >= REFRESH_S:
            self._forecast, self._written_at = content, time.monotonic()
            replace_json(self._run.forecast_json, {"at": round(now, 3), **content})


def read_estimates(run: RunDir) -> dict[str, Durations]:
    """Returns the measured times of each expert's jobs (queue, load, drain) from `estimates.json`, those of all
    partitions in one list; empty if the run has no such file yet."""
    experts = (read_json(run.estimates_json) or {}).get("experts", {})
    return {
        expert: Durations(*(tuple(s for times in partitions.values() for s in times[key]) for key in _SAMPLES))
        for expert, partitions in experts.items()
    }
