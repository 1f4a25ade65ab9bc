"""What the control process knows of the replicas, as its workers take it over: JSON values, and no I/O.

A worker's table is made as the view says. Where the worker has seen something itself that the view does not know yet,
its own finding stands.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from hpc_router.router.ipc.shared_counters import NOWHERE, Counters
from hpc_router.router.replicas.health import ReplicaHealth
from hpc_router.router.replicas.replica import Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.registry import Record

View = Sequence[Mapping[str, Any]]


def view_of(table: ReplicaTable) -> list[dict[str, Any]]:
    return [_told(replica) for replica in table.all()]


def take_over(table: ReplicaTable, view: View, *, known_better: Collection[str] = ()) -> None:
    """`known_better`: the replicas whose standing the view cannot know yet, by name."""
    gone = {replica.name for replica in table.all()}
    for told in view:
        record = Record.from_json(told["record"])
        gone.discard(record.replica)
        replica = table.get(record.replica)
        if replica is None or not replica.is_at(record):
            replica = Replica(record, told["key"])
            _update(table, replica, told)
            table.put(replica)
            table.adopt(replica, RoutingState(told["standing"]), lost=told["lost"])
            continue
        _update(table, replica, told)
        table.renew(replica, record)
        if record.replica not in known_better:
            table.adopt(replica, RoutingState(told["standing"]), lost=told["lost"])
    for name in gone:
        table.remove(name)


def give_columns(table: ReplicaTable, counters: Counters, *, experts: Iterable[str] = ()) -> None:
    """To each replica, and to what waits for each expert, a column of its own; who has one keeps it."""
    taken = {replica.column for replica in table.all()} | set(table.queues.values())
    for replica in table.all():
        if replica.column == NOWHERE:
            replica.column = counters.allocate(taken)
    wanted = table.experts() | set(experts)
    if wanted != table.queues.keys():
        table.queues = {e: table.queues.get(e) or counters.allocate(taken) for e in wanted}


def _told(replica: Replica) -> dict[str, Any]:
    return {
        "record": replace(replica.record, beat=None).to_json(),
        "key": replica.key,
        "standing": replica.standing.value,
        "models": list(replica.models),
        "trouble": replica.trouble,
        "suspect": replica.suspect,
        "lost": replica.standing is RoutingState.EJECTED and replica.health.counts(time.monotonic()),
        "health": astuple(replica.health),
        "column": replica.column,
    }


def _update(table: ReplicaTable, replica: Replica, told: Mapping[str, Any]) -> None:
    replica.key, replica.models, replica.trouble = told["key"], tuple(told["models"]), told["trouble"]
    replica.suspect, replica.health = told["suspect"], ReplicaHealth(*told["health"])
    table.move(replica, told["column"])
