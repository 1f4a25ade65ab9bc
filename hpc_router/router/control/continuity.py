"""Measures how long experts have no ready replica. Also counts the replicas that reached the end of their walltime, by
whether a successor was ready then.

`update` is called after changes of the replica table, once for all changes in one step of the event loop. The
measurement of an expert begins when it is ready for the first time in this router. No I/O.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hpc_router.router.replicas.replica import Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable

MAX_COUNTED: Final = 200


@dataclass(slots=True)
class Continuity:
    """The measurements by expert. A replica has reached its end if it stops being ready with at most `near_end_s`
    seconds of walltime left, or with a successor ready."""

    near_end_s: float
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    handovers: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of replicas that reached their end, by expert and outcome: `overlap` if the successor was ready, else
    `gap`."""
    counted: dict[str, list[list[str]]] = field(default_factory=dict)
    """The last MAX_COUNTED replicas in `handovers`, each with its labels. An older router that still runs may count a
    replica that this one never saw ready, and both may count the same one."""
    _unready_s: dict[str, float] = field(default_factory=dict)
    _measured: set[str] = field(default_factory=set)
    _unready_since: dict[str, float] = field(default_factory=dict)
    _ready: dict[str, Replica] = field(default_factory=dict)

    def update(self, table: ReplicaTable, *, unwanted: Collection[str] = ()) -> None:
        """Updates the measurements to the present states in `table`. `unwanted`: experts that should have no replica;
        their time without a replica is not measured."""
        now = self.clock()
        ready = {r.name: r for r in table.all() if r.state is RoutingState.READY}
        experts = {expert for replica in ready.values() for expert in replica.record.serves}
        for expert in experts:
            self._unready_s.setdefault(expert, 0.0)
        self._measured |= experts
        for expert in self._measured:  # others are known only from a predecessor
            if expert not in experts and expert not in unwanted:
                self._unready_since.setdefault(expert, now)
            elif (since := self._unready_since.pop(expert, None)) is not None:
                self._unready_s[expert] += now - since
        for name in self._ready.keys() - ready.keys():
            self._count_handover(self._ready[name], ready, left=table.get(name) is None)
        self._ready = ready

    def unready_s(self, expert: str) -> float:
        """Returns for how many seconds the expert has had no ready replica so far, in total."""
        since = self._unready_since.get(expert)
        return self._unready_s.get(expert, 0.0) + (0.0 if since is None else self.clock() - since)

    def dump(self) -> dict[str, Any]:
        """Returns the counts as JSON values, for the successor of this router."""
        return {
            "unready_s": {expert: self.unready_s(expert) for expert in self._unready_s},
            "handovers": [[*labels, count] for labels, count in self.handovers.items()],
            "counted": self.counted,
        }

    def absorb(self, dumped: Mapping[str, Any]) -> None:
        """Adds all counts of this router's predecessor, as returned by its `dump`. Called once; `follow` adds what the
        predecessor counts afterwards."""
        for expert, seconds in dumped.get("unready_s", {}).items():
            self._unready_s[expert] = self._unready_s.get(expert, 0.0) + seconds
        for expert, outcome, count in dumped.get("handovers", ()):
            self.handovers[expert, outcome] += count
        counted: Mapping[str, list[list[str]]] = dumped.get("counted", {})
        for replica in self.counted.keys() & counted.keys():
            self.handovers.subtract((expert, outcome) for expert, outcome in counted[replica])
        self._remember(counted)

    def follow(self, dumped: Mapping[str, Any]) -> None:
        """Adds those handovers in a predecessor's `dump` that neither an earlier call nor this router itself has
        counted."""
        counted: Mapping[str, list[list[str]]] = dumped.get("counted", {})
        new = {replica: labels for replica, labels in counted.items() if replica not in self.counted}
        self.handovers.update((expert, outcome) for labels in new.values() for expert, outcome in labels)
        self._remember(new)

    def _remember(self, counted: Mapping[str, list[list[str]]]) -> None:
        self.counted |= counted
        for replica in list(self.counted)[:-MAX_COUNTED]:
            del self.counted[replica]

    def metrics(self) -> Iterator[Metric]:
        unready = CounterMetricFamily(
            "hpc_router_unready_seconds", "Time without a ready replica, since the first one.", labels=("expert",)
        )
        for expert in sorted(self._unready_s):
            unready.add_metric((expert,), self.unready_s(expert))
        handovers = CounterMetricFamily(
            "hpc_router_handovers", "Replicas that reached the end of their walltime.", labels=("expert", "outcome")
        )
        for labels, count in sorted(self.handovers.items()):
            handovers.add_metric(labels, count)
        expires = GaugeMetricFamily(
            "hpc_router_replica_expires_timestamp_seconds", "End of the replica's walltime.", labels=("replica",)
        )
        for name, replica in sorted(self._ready.items()):
            if replica.record.expires_at is not None:
                expires.add_metric((name,), replica.record.expires_at)
        yield from (unready, handovers, expires)

    def _count_handover(self, replica: Replica, ready: dict[str, Replica], *, left: bool) -> None:
        """Counts a handover for a replica that is not ready any more, under two conditions: the replica drains or has
        left the table (`left`), and a successor is ready or the replica's walltime is nearly over. `ready`: the ready
        replicas by name."""
        expires_at = replica.record.expires_at
        if expires_at is None or not (left or replica.state is RoutingState.DRAINING) or replica.name in self.counted:
            return
        generation = replica.record.generation
        replaced = any(r.slot_name == replica.slot_name and r.record.generation > generation for r in ready.values())
        if replaced or expires_at - self.wall_clock() <= self.near_end_s:
            outcome = "overlap" if replaced else "gap"
            self.follow({"counted": {replica.name: [[expert, outcome] for expert in replica.record.serves]}})
