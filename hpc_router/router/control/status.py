"""Builds the body of `GET /status`: the router's whole state as one JSON object."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hpc_router import __version__
from hpc_router.router.control.discovery import Discovery
from hpc_router.router.control.replica_stats import ReplicaStats, degradation
from hpc_router.router.replicas.admission import DepartureRate
from hpc_router.router.replicas.replica import Replica
from hpc_router.router.replicas.table import ReplicaTable


def status(
    table: ReplicaTable,
    discovery: Discovery,
    *,
    experts: list[str],
    policy: dict[str, object],
    departure_rates: Mapping[str, DepartureRate],
    stats: Mapping[str, ReplicaStats],
    now: float,
    **router: object,
) -> dict[str, Any]:
    """Returns the body of `GET /status`. `experts`: the configured experts, and all others that have a replica.
    `policy`: the section on the policy. `departure_rates`, `stats`: by expert the rate of its queue, by replica its
    statistics. `router`: further fields of the section on the router."""
    return {
        "router": {"version": __version__, "registry_age_s": round(discovery.registry_age_s(), 3), **router},
        "policy": policy,
        "experts": {
            name: {
                "ready": sum(r.state == "ready" for r in table.of(name)),
                "in_flight": table.load(name),
                "max_in_flight": table.bounds.in_flight.get(name),
                "waiting": table.waiting(name),
                "max_waiting": table.bounds.waiting,
                **_queue(departure_rates.get(name), table.waiting(name), now),
                "replicas": [
                    _replica(r, silent=discovery.is_silent(r)) | _recent(r, table.of(name), stats)
                    for r in table.of(name)
                ],
            }
            for name in experts
        },
    }


def _queue(rate: DepartureRate | None, waiting: int, now: float) -> dict[str, float | None]:
    """Returns the departures per second from a queue (None if there was none recently) and the expected wait in it in
    seconds (None if it is empty). `waiting`: number of requests in it."""
    per_s = None if rate is None else rate.per_s(now)
    wait_s = None if rate is None or not waiting else round(rate.wait_s(waiting, now), 3)
    return {"pace_per_s": None if per_s is None else round(per_s, 3), "wait_s": wait_s}


def _recent(replica: Replica, all_of_expert: Sequence[Replica], stats: Mapping[str, ReplicaStats]) -> dict[str, Any]:
    """Returns the recent statistics of the replica; a value is None if there were too few responses. `all_of_expert`:
    all replicas of its expert, for the comparison."""
    one = stats.get(replica.name) or ReplicaStats()
    others = [known for r in all_of_expert if r is not replica and (known := stats.get(r.name)) is not None]
    return {
        "error_share": None if one.error_share is None else round(one.error_share, 3),
        "first_byte_s": None if one.first_byte_s is None else round(one.first_byte_s, 3),
        "sick": degradation(one, others),
    }


def _replica(replica: Replica, *, silent: bool) -> dict[str, Any]:
    record = replica.record
    return {
        "replica": replica.name,
        "kind": record.kind.value,
        "state": replica.state.value,
        "in_flight": replica.load,
        "capacity": replica.capacity,
        "url": record.url,
        "node": record.node,
        "job_id": record.job_id,
        "expires_at": record.expires_at,
        "silent": silent,
        "trouble": replica.trouble,
        "models": list(replica.models),
        "max_model_len": replica.max_model_len,
        "load_s": record.load_s,
        "engine_load": None if replica.engine_load is None else asdict(replica.engine_load),
    }
