"""Writes the demand for each expert at this router to a file, which the control loop reads (`state.demand`).

A request counts as demand for the expert that was chosen for it, while it waits or is in flight. It also counts if no
replica of that expert was ready, so that it was refused or another expert served it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hpc_router.config.adapters import adapters_of, hosts
from hpc_router.config.schema import Deployment
from hpc_router.errors import RegistryError
from hpc_router.router.replicas.admission import DepartureRate
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.atomic_files import read_json, replace_json
from hpc_router.state.demand import ExpertDemand, RouterDemand, demand_path
from hpc_router.state.io_thread import FileThread
from hpc_router.state.registry import RecordKind, split_replica
from hpc_router.state.run_directory import RunDir, make_private_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DemandCounts:
    """What all workers have counted. `requests`: by expert, a number that grows with every request for it; `rates`: the
    rates at which requests leave the experts' queues for a replica."""

    requests: Mapping[str, int]
    rates: Mapping[str, DepartureRate]


def counts_by_expert(dumps: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Returns, by expert, the number of finished requests plus that of cold starts. `dumps`: the workers' metrics."""
    counts: dict[str, int] = {}
    for dump in dumps:
        for key in ("requests", "cold_starts"):
            for labels, count in dump.get(key, ()):
                counts[labels[0]] = counts.get(labels[0], 0) + count
    return counts


@dataclass(slots=True)
class DemandReport:
    """Measures and writes the demand at one router. `router`: its name. `counts`: returns the counts of the workers."""

    run: RunDir
    router: str
    deployment: Deployment
    table: ReplicaTable
    files: FileThread
    counts: Callable[[], DemandCounts]
    _last_request_at: dict[str, float] = field(default_factory=dict)
    _requests: dict[str, int] | None = None
    _written: RouterDemand | None = None

    async def report_forever(self) -> None:
        """Writes the demand to the router's file whenever it has changed, at most once per `cluster.reconcile_s`."""
        before = await self.files.run(partial(read_json, demand_path(self.run, self.router)))
        self._resume(before)
        await self.files.run(partial(_remove_old, self.run, self.router))
        while True:
            demand = self.measure(time.time())
            if demand != self._written:
                try:
                    await self.files.run(partial(_write, self.run, self.router, demand))
                    self._written = demand
                except OSError as error:
                    logger.warning("the demand cannot be written, so the number of replicas stays: %s", error)
            await asyncio.sleep(self.deployment.cluster.reconcile_s)

    def measure(self, now: float) -> RouterDemand:
        """Returns the present demand. The requests of adapters count for their host. `now`: Unix seconds."""
        counted, table = self.counts(), self.table
        table.refresh_peer_counts(table.all())
        experts: dict[str, ExpertDemand] = {}
        requests: dict[str, int] = {}
        for host in hosts(self.deployment.experts):
            names = [host, *adapters_of(self.deployment.experts, host)]
            in_flight = sum(r.load for r in table.of(host) if r.record.kind is RecordKind.EXPERT)
            waiting = {name: table.waiting(name) for name in names}
            waits = [r.wait_s(w, table.clock()) for n, w in waiting.items() if w and (r := counted.rates.get(n))]
            requests[host] = sum(counted.requests.get(name, 0) for name in names)
            known = self._requests is None or requests[host] == self._requests.get(host, 0)
            if in_flight or any(waiting.values()) or not known:
                self._last_request_at[host] = round(now, 1)
            wait_s = round(max(waits, default=0.0), 1)
            experts[host] = ExpertDemand(in_flight, sum(waiting.values()), wait_s, self._last_request_at.get(host))
        self._requests = requests
        asked = [r for r in table.all() if r.record.kind is RecordKind.EXPERT]
        loads = {r.name: r.engine_load for r in asked}
        tokens = {n: int(c) for n, load in loads.items() if load and (c := load.generated_tokens) is not None}
        return RouterDemand(experts, {r.name: r.load for r in asked}, tokens)

    def _resume(self, before: Mapping[str, Any] | None) -> None:
        """Takes over the times of the last requests from the router's file (`before`), which an earlier control process
        of this router has written; None if there is no file."""
        try:
            last = None if before is None else RouterDemand.from_json(before)
        except ValueError:
            last = None
        if last is not None:
            times = {name: demand.last_request_at for name, demand in last.experts.items()}
            self._last_request_at |= {name: at for name, at in times.items() if at is not None}


def _write(run: RunDir, router: str, demand: RouterDemand) -> None:
    """Writes the demand to the file of `router`. Creates the folder if the run was made by a version without it."""
    make_private_folder(run.demand)
    replace_json(demand_path(run, router), demand.to_json())


def _remove_old(run: RunDir, router: str) -> None:
    """Removes the demand files of earlier routers, except that of the last one before this, which may still serve."""
    generation = split_replica(router)[2]
    for path in run.demand.glob("*.json"):
        with suppress(RegistryError, OSError):
            if split_replica(path.stem)[2] < generation - 1:
                path.unlink()
