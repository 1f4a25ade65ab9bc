"""Drains the replicas that the user names: they finish their requests and end, and the control loop replaces them.

A replica gets a drain call over HTTP; if it cannot be reached, its job gets SIGTERM, which drains it as well. If the
user names a node, its replicas are drained, but not a router there. If the user names the router, its standby is not
drained, because the standby replaces it; only its full name drains a standby. No job starts on a drained node until
`drain --undo`, not even one that is already in the queue. The desired replica counts do not change.
"""

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from hpc_router.cluster.commands.router_access import live_router
from hpc_router.cluster.control_loop.desired_state import exclude_nodes, include_nodes
from hpc_router.cluster.control_loop.drain_calls import ask_to_drain
from hpc_router.cluster.control_loop.loop import ControlLoop, LoopPass
from hpc_router.cluster.control_loop.reconcile import Wait
from hpc_router.cluster.control_loop.slots import Attempt, Observed, all_attempts
from hpc_router.cluster.launchers.interface import ROUTER, JobState
from hpc_router.cluster.signals import explaining_interrupt
from hpc_router.config.adapters import host_of, hosts
from hpc_router.errors import ConfigError, suggest
from hpc_router.state.job_records import JobDir
from hpc_router.state.registry import Record, RecordKind, split_replica
from hpc_router.state.run_directory import RunDir

POLL_S: Final = 0.2
MARGIN_S: Final = 30.0
"""Seconds that `wait` adds to the drain time of a replica."""


@dataclass(frozen=True, slots=True)
class DrainResult:
    """What `drain` did. `asked`: replicas that got the drain call. `signalled`: replicas whose job got SIGTERM instead.
    `left`: replicas that had not ended in time; None if the command did not wait. `successor`: the router that remains;
    None if none does. `excluded`: nodes on which no further job starts."""

    asked: tuple[str, ...]
    signalled: tuple[str, ...]
    left: tuple[str, ...] | None = None
    successor: str | None = None
    excluded: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(sorted(self.asked + self.signalled))

    def lines(self) -> list[str]:
        return [
            *(f"{replica} drains" for replica in self.asked),
            *(f"{replica} drains: its job got SIGTERM" for replica in self.signalled),
            *(f"no further job starts on node {node} until `hpc-router drain --undo {node}`" for node in self.excluded),
        ]

    def needs_reconcile(self, run: RunDir) -> bool:
        """Returns whether the drained jobs are replaced only if the user runs `hpc-router reconcile`: no router
        remains, and a control loop ends with its router."""
        if self.successor is not None:
            return False
        return any(split_replica(name)[0] == ROUTER for name in self.replicas) or live_router(run) is None

    def to_json(self) -> dict[str, Any]:
        left = None if self.left is None else list(self.left)
        ended = None if self.left is None else [name for name in self.replicas if name not in self.left]
        return {"asked": list(self.asked), "signalled": list(self.signalled), "ended": ended, "left": left}


def select_jobs(
    names: Iterable[str], observed: Observed, records: Mapping[str, Record], *, experts: Iterable[str]
) -> list[Attempt]:
    """Returns the live jobs that `names` select. A name is that of a replica, a slot, an expert or a node, or the word
    `router`. Raises ConfigError for another name. For a node whose jobs have all ended, returns no jobs."""
    attempts = all_attempts(observed)
    live = [attempt for attempt in attempts if attempt.live]
    nodes = {a.replica: _nodes(a, records.get(a.replica)) for a in attempts}
    known = {*experts, ROUTER, *(a.replica for a in attempts), *(str(slot) for slot in observed), *_union(nodes)}
    chosen: dict[str, Attempt] = {}
    standbys = {a.replica for found in observed.values() for a in _standbys(found)}
    for name in names:
        if name not in known:
            _refuse_unknown(name, live, records, experts=experts, nodes=_union(nodes))
        for attempt in live:
            slot = attempt.slot
            at_node = name in nodes[attempt.replica] and slot.expert != ROUTER
            by_slot = name in (str(slot), slot.expert) and attempt.replica not in standbys
            if name == attempt.replica or by_slot or at_node:
                chosen[attempt.replica] = attempt
    return [chosen[replica] for replica in sorted(chosen)]


def _standbys(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Returns the standby routers of a slot: those that wait for the end of a router that serves or drains."""
    routers = [a for a in attempts if a.live and a.slot.expert == ROUTER]
    serving = [a for a in routers if a.ready] or [a for a in routers if a.job is not JobState.PENDING]
    return [a for a in routers if serving and a not in serving]


def successor(observed: Observed, chosen: Sequence[Attempt]) -> str | None:
    """Returns the newest live router that is neither in `chosen` nor asked to end; None if there is none."""
    routers = [a for a in all_attempts(observed) if a.live and a.slot.expert == ROUTER]
    left = [a for a in routers if a not in chosen and not a.stop_requested]
    return max(left, key=lambda a: a.generation).replica if left else None


def drain(control: ControlLoop, names: Sequence[str]) -> DrainResult:
    """Drains the jobs that `names` select, and excludes the nodes among them. Raises ConfigError for an unknown
    name."""
    seen = control.preview(fresh=True)
    observed = seen.observed
    records = control.observer.records
    experts = control.deployment.experts
    for name in names:
        if name in experts and host_of(experts, name) != name:
            host = host_of(experts, name)
            message = f"{name} is an adapter on the engine of {host}; drain {host}, which drains all that it serves"
            raise ConfigError(f"drain: {message}")
    chosen = select_jobs(names, observed, records, experts=hosts(experts))
    with explaining_interrupt(lambda: f"`hpc-router drain {shlex.join(names)}` again completes what was begun"):
        excluded = _selected_nodes(names, observed, records, experts=hosts(experts))
        if control.deployment.cluster.kind != "slurm":
            excluded = ()
        if excluded:  # first, because replacements are submitted at once
            exclude_nodes(control.run, excluded, reason="drain")
            control.apply_exclusions(seen)
        asked, signalled = _ask(control, chosen)
    warnings = tuple(unserved_warnings(observed, chosen, records.values()))
    return DrainResult(asked, signalled, successor=successor(observed, chosen), excluded=excluded, warnings=warnings)


def undo(control: ControlLoop, nodes: Sequence[str]) -> None:
    """Ends the exclusion of these nodes, so that jobs may start there again, including jobs in the queue. Raises
    ConfigError for a node that is not excluded."""
    include_nodes(control.run, nodes)
    control.apply_exclusions(control.preview(fresh=True))


def _ask(control: ControlLoop, chosen: Sequence[Attempt]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Drains the jobs in `chosen`. Returns the replicas that got the drain call, and those whose job got SIGTERM
    instead."""
    records = control.observer.records
    registered = [a for a in chosen if a.replica in records and a.slot.expert != ROUTER]
    for attempt in registered:
        if attempt.stop.drain_at is None:
            JobDir(control.run, attempt.replica).write(replace(attempt.stop, drain_at=time.time()))
        control.run.event("drain", replica=attempt.replica)
    unreachable = {record.replica for record in ask_to_drain(control.run, [records[a.replica] for a in registered])}
    asked = tuple(a.replica for a in registered if a.replica not in unreachable)
    signalled = tuple(a.replica for a in chosen if a.replica not in asked)
    control.cancel(signalled)
    return asked, signalled


def unserved_warnings(observed: Observed, going: Sequence[Attempt], records: Iterable[Record]) -> Iterator[str]:
    """Yields a warning for each expert all of whose ready replicas are in `going`, the jobs that are about to end."""
    elsewhere = {expert for record in records if record.kind is RecordKind.EXTERNAL for expert in record.serves}
    for expert in sorted({attempt.slot.expert for attempt in going} - {ROUTER} - elsewhere):
        ready = [a for a in all_attempts(observed) if a.ready and a.slot.expert == expert]
        if ready and all(attempt in going for attempt in ready):
            yield f"{expert} has no ready replica until another one starts; requests for it wait or fail until then"


def wait(
    control: ControlLoop,
    drained: DrainResult,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> DrainResult:
    """Waits until all replicas in `drained` have ended, or the time limit of a drain has passed. Returns `drained` with
    the replicas that are `left`. If no control loop replaces the jobs, runs the passes that replace them."""
    cluster, router = control.deployment.cluster, control.deployment.router
    deadline = clock() + max(cluster.drain_s, router.drain_s) + MARGIN_S
    no_loop = drained.needs_reconcile(control.run)
    left = drained.replicas
    while (left := tuple(name for name in left if not _has_ended(control.run, name))) and clock() < deadline:
        sleep(cluster.reconcile_s if no_loop else POLL_S)
        if no_loop:
            control.preview()  # writes the missing exit record of a job that ended
    if no_loop:
        while _unfilled(control.run_pass(fresh=True), drained.replicas) and clock() < deadline:
            sleep(cluster.reconcile_s)
    return replace(drained, left=left)


def interrupted_text(run: RunDir, drained: DrainResult) -> str:
    """Returns the text for the user after Ctrl-C: which replicas still drain, and, if no control loop remains, the
    command that replaces them."""
    left = ", ".join(name for name in drained.replicas if not _has_ended(run, name))
    parts = [f"{left} will end after the requests in flight" if left else "all have ended"]
    if drained.needs_reconcile(run):
        parts.append(f"`hpc-router reconcile --run {shlex.quote(str(run.path))}` replaces what ended")
    return "; ".join(parts)


def _unfilled(seen: LoopPass, replicas: Sequence[str]) -> bool:
    """Returns whether another pass is needed to replace these replicas: one of them is still live, or the next job of
    its slot waits for a pause after a failure."""
    slots = {split_replica(name)[:2] for name in replicas}
    live = any(a.live and a.replica in replicas for a in all_attempts(seen.observed))
    return live or any(isinstance(a, Wait) and split_replica(a.replica)[:2] in slots for a in seen.actions)


def _has_ended(run: RunDir, replica: str) -> bool:
    job = JobDir(run, replica)
    return job.exit() is not None or job.ended() is not None or not job.path.exists()


def _nodes(attempt: Attempt, record: Record | None) -> set[str]:
    names = {attempt.node, attempt.report.node, record.node if record is not None else None} - {None}
    return {str(name) for name in names} | {str(name).partition(".")[0] for name in names}


def _selected_nodes(
    names: Iterable[str], observed: Observed, records: Mapping[str, Record], *, experts: Iterable[str]
) -> tuple[str, ...]:
    """Returns the names in `names` that are nodes, as Slurm writes them: without the domain."""
    attempts = all_attempts(observed)
    others = {*experts, ROUTER, *(a.replica for a in attempts), *(str(slot) for slot in observed)}
    nodes = _union({a.replica: _nodes(a, records.get(a.replica)) for a in attempts})
    return tuple(name.partition(".")[0] for name in dict.fromkeys(names) if name in nodes and name not in others)


def _union(nodes: Mapping[str, set[str]]) -> set[str]:
    return set().union(*nodes.values())


def _refuse_unknown(
    name: str, live: Sequence[Attempt], records: Mapping[str, Record], *, experts: Iterable[str], nodes: set[str]
) -> None:
    external = [r.replica for r in records.values() if r.kind is RecordKind.EXTERNAL]
    if name in external or f"{name}.g1" in external:
        raise ConfigError(f"drain: {name} is an external endpoint; `hpc-router unregister {name}` removes it")
    valid = [*experts, *(a.replica for a in live), *(str(a.slot) for a in live), *nodes]
    raise ConfigError(f"drain: this run has nothing named '{name}'{suggest(name, valid)}")
