"""`GET /status`: the router's whole state as one JSON object."""

from typing import Any

from hpc_router import __version__
from hpc_router.router.discovery import Discovery
from hpc_router.router.replicas import Replica, ReplicaTable


def status(
    table: ReplicaTable, discovery: Discovery, *, experts: list[str], policy: dict[str, object], **router: object
) -> dict[str, Any]:
    """`experts`: all that exist or are configured; `router`: what the router says of itself."""
    return {
        "router": {"version": __version__, "registry_age_s": round(discovery.registry_age_s(), 3), **router},
        "policy": policy,
        "experts": {
            name: {
                "ready": sum(r.standing == "ready" for r in table.of(name)),
                "waiting": table.waiting(name),
                "replicas": [_replica(r, silent=discovery.is_silent(r)) for r in table.of(name)],
            }
            for name in experts
        },
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
