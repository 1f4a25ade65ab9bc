"""Snapshots of the replica table: the control process takes them, and its workers apply them to their own tables. No
I/O.

A snapshot is a tuple of frozen values. A worker's table follows the snapshot, with one exception: if the worker has
observed something of a replica after the snapshot was taken, it keeps its own state of that replica.
"""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from hpc_router.router.replicas.engine_load import EngineLoad
from hpc_router.router.replicas.health import ReplicaHealth
from hpc_router.router.replicas.replica import Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.registry import Record


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """The state of one `Replica`, without its requests. `record`: the replica's record without the beat counter, which
    changes too often. `lost`: whether requests on the replica have the short timeout of a lost replica."""

    record: Record
    key: str | None
    state: RoutingState
    models: tuple[str, ...]
    listed_max_model_len: int | None
    trouble: str | None
    recent_error: bool
    lost: bool
    health: ReplicaHealth
    column: int
    engine_load: EngineLoad | None


def snapshot_of(table: ReplicaTable) -> tuple[ReplicaSnapshot, ...]:
    """Returns the snapshot of all replicas in `table`."""
    return tuple(map(_snapshot, table.all()))


def apply_snapshot(
    table: ReplicaTable, snapshot: Iterable[ReplicaSnapshot], *, keep_state: Collection[str] = ()
) -> None:
    """Updates `table` to the snapshot: adds, updates and removes replicas. `keep_state`: names of replicas that keep
    their state in `table`, because the snapshot is older than this worker's last observation of them."""
    missing = {replica.name for replica in table.all()}
    for item in snapshot:
        record = item.record
        missing.discard(record.replica)
        replica = table.get(record.replica)
        if replica is None or not replica.is_at(record):
            replica = Replica(record, item.key)
            _update(table, replica, item)
            table.put(replica)
            table.set_state(replica, item.state, lost=item.lost)
            continue
        _update(table, replica, item)
        table.renew(replica, record)
        if record.replica not in keep_state:
            table.set_state(replica, item.state, lost=item.lost)
    for name in missing:
        table.remove(name)


def _snapshot(replica: Replica) -> ReplicaSnapshot:
    return ReplicaSnapshot(
        record=replace(replica.record, beat=None),
        key=replica.key,
        state=replica.state,
        models=replica.models,
        listed_max_model_len=replica.listed_max_model_len,
        trouble=replica.trouble,
        recent_error=replica.recent_error,
        lost=replica.state is RoutingState.EJECTED and not replica.health.is_excluded(time.monotonic()),
        health=replace(replica.health),
        column=replica.column,
        engine_load=replica.engine_load,
    )


def _update(table: ReplicaTable, replica: Replica, item: ReplicaSnapshot) -> None:
    if item.key != replica.key:
        replica.request_starts.clear()  # the cached bytes contain the key
    replica.key, replica.models, replica.trouble = item.key, item.models, item.trouble
    replica.listed_max_model_len = item.listed_max_model_len
    if item.engine_load != replica.engine_load:
        replica.set_engine_load(item.engine_load)
    replica.recent_error, replica.health = item.recent_error, replace(item.health)
    table.reassign_column(replica, item.column)
