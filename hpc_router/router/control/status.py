"""`GET /status`: the router's whole state as one JSON object."""

from collections.abc import Mapping, Sequence
from typing import Any

from hpc_router import __version__
from hpc_router.router.control.discovery import Discovery
from hpc_router.router.control.replica_stats import ReplicaStats, sickness
from hpc_router.router.replicas.admission import DepartureRate
from hpc_router.router.replicas.replica import Replica
from hpc_router.router.replicas.table import ReplicaTable


def status(
    table: ReplicaTable,
    discovery: Discovery,
    *,
    experts: list[str],
    policy: dict[str, object],
    paces: Mapping[str, DepartureRate],
    recent: Mapping[str, ReplicaStats],
    now: float,
    **router: object,
) -> dict[str, Any]:
    """`experts`: all that exist or are configured; `paces` of their queues; `router`: what it says of itself."""
    return {
        "router": {"version": __version__, "registry_age_s": round(discovery.registry_age_s(), 3), **router},
        "policy": policy,
        "experts": {
            name: {
                "ready": sum(r.standing == "ready" for r in table.of(name)),
                "in_flight": table.load(name),
                "max_in_flight": table.bounds.in_flight.get(name),
                "waiting": table.waiting(name),
                "max_waiting": table.bounds.waiting,
                **_moves(paces.get(name), table.waiting(name), now),
                "replicas": [
                    _replica(r, silent=discovery.is_silent(r)) | _of_late(r, table.of(name), recent)
                    for r in table.of(name)
                ],
            }
            for name in experts
        },
    }


def _moves(pace: DepartureRate | None, waiting: int, now: float) -> dict[str, float | None]:
    """How fast its queue moves, and how long those who wait will take; null: nobody waits, or nobody has left."""
    per_s = None if pace is None else pace.per_s(now)
    wait_s = None if pace is None or not waiting else round(pace.wait_s(waiting, now), 3)
    return {"pace_per_s": None if per_s is None else round(per_s, 3), "wait_s": wait_s}


def _of_late(replica: Replica, all_of_expert: Sequence[Replica], recent: Mapping[str, ReplicaStats]) -> dict[str, Any]:
    """How it has answered lately; null: too seldom to say."""
    one = recent.get(replica.name) or ReplicaStats()
    others = [known for r in all_of_expert if r is not replica and (known := recent.get(r.name)) is not None]
    return {
        "error_share": None if one.error_share is None else round(one.error_share, 3),
        "first_byte_s": None if one.first_byte_s is None else round(one.first_byte_s, 3),
        "sick": sickness(one, others),
    }


def _replica(replica: Replica, *, silent: bool) -> dict[str, Any]:
    record = replica.record
    return {
        "replica": replica.name,
        "kind": record.kind.value,
        "state": replica.standing.value,
        "in_flight": replica.load,
        "capacity": replica.capacity,
        "url": record.url,
        "node": record.node,
        "job_id": record.job_id,
        "silent": silent,
        "trouble": replica.trouble,
        "models": list(replica.models),
    }
