"""`GET /status`: the router's whole state as one JSON object."""

import time
from typing import TYPE_CHECKING, Any

from hpc_router import __version__
from hpc_router.router.replicas import Replica

if TYPE_CHECKING:
    from hpc_router.router.app import Gateway


def status_of(gateway: "Gateway") -> dict[str, Any]:
    table, deployment = gateway.table, gateway.deployment
    names = sorted(table.experts() | set(deployment.experts))
    return {
        "router": {
            "replica": gateway.replica,
            "version": __version__,
            "uptime_s": round(time.time() - gateway.started_at, 3),
            "in_flight": gateway.in_flight,
            "registry_age_s": round(gateway.dispatcher.discovery.registry_age_s(), 3),
            "open": gateway.token is None,
        },
        "policy": {
            "kind": deployment.policy.kind,
            "fallback": deployment.policy.fallback,
            "version": gateway.policy.version,
        },
        "experts": {
            name: {
                "ready": sum(r.standing == "ready" for r in table.of(name)),
                "waiting": table.waiting(name),
                "replicas": [_replica(r, gateway) for r in table.of(name)],
            }
            for name in names
        },
    }


def _replica(replica: Replica, gateway: "Gateway") -> dict[str, Any]:
    record = replica.record
    return {
        "replica": replica.name,
        "kind": record.kind.value,
        "state": replica.standing.value,
        "in_flight": replica.in_flight,
        "capacity": replica.capacity,
        "url": record.url,
        "node": record.node,
        "job_id": record.job_id,
        "silent": gateway.dispatcher.discovery.is_silent(replica),
        "trouble": replica.trouble,
        "models": list(replica.models),
    }
