"""The control process: the part of a router that runs once, however many workers the router has.

It discovers and probes the replicas, judges their health from the workers' reports, watches the settings, and answers
`/status` and `/metrics` for all workers, so that each of them gives the same answer. A control process that replaces a
dead one gets all its state from the workers, which use their last snapshot until then. It serves no clients.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

from hpc_router.background_tasks import background
from hpc_router.config.schema import Deployment
from hpc_router.errors import HpcRouterError
from hpc_router.router.control.batch_process import BatchProcess
from hpc_router.router.control.certificate_watcher import CertificateWatcher
from hpc_router.router.control.config_watcher import ConfigWatcher
from hpc_router.router.control.continuity import Continuity
from hpc_router.router.control.demand_report import DemandCounts, DemandReport, counts_by_expert
from hpc_router.router.control.discovery import Discovery
from hpc_router.router.control.drift import Drift, drift
from hpc_router.router.control.engine_metrics import EngineLoads
from hpc_router.router.control.overview import (
    SAMPLE_S,
    CounterSample,
    Queues,
    RunFiles,
    Traffic,
    overview,
    read_run_files,
)
from hpc_router.router.control.predecessor import Predecessor, handover_page
from hpc_router.router.control.record_limit import limit_records_forever
from hpc_router.router.control.registry_file import RegistryFile
from hpc_router.router.control.replica_stats import ReplicaStats, increase, totals_by_replica
from hpc_router.router.control.shared_address import SharedAddress, shared_address
from hpc_router.router.control.status import status
from hpc_router.router.control.token_watcher import TokenWatcher
from hpc_router.router.control.workers import WorkerConnection, Workers
from hpc_router.router.ipc import messages
from hpc_router.router.ipc.shared_counters import IN_FLIGHT, Counters
from hpc_router.router.ipc.supervisor import CONTROL, worker_name
from hpc_router.router.metrics import Metrics, departures, gauges, usage_metrics
from hpc_router.router.policies import artefact_folder
from hpc_router.router.replicas.admission import DepartureRate, queue_limits
from hpc_router.router.replicas.fair_order import CLASSES
from hpc_router.router.replicas.health import Incident
from hpc_router.router.replicas.replica import Replica
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.settings import scaled_to_zero
from hpc_router.routing.artefact import read_training
from hpc_router.routing.policy import Policy, versions
from hpc_router.state.gpu_hours import Usage, parse_usage
from hpc_router.state.io_thread import FileThread
from hpc_router.state.lease import Lease
from hpc_router.state.registry import Record, RegistryReader, split_replica
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import StampedFile
from hpc_router.state.user_tokens import UserToken

logger = logging.getLogger(__name__)

READ_S: Final = 0.5
"""Maximum time in seconds that the overview waits for the run directory."""
TAKE_OVER_S: Final = 5.0
"""Maximum time in seconds that a new router waits for the data of an older router."""


@dataclass(slots=True)
class ControlProcess:
    """The parts of the control process and the connections between them.

    `base`: the deployment that the router was started with; `deployment`: the same with the settings made since then.
    `artefact`, `shadow`: versions of the classifiers in use. `started_at`: start of the router in Unix seconds.
    `processes`: the supervisor's status of each process, by name.
    """

    run: RunDir
    base: Deployment
    deployment: Deployment
    counters: Counters
    files: FileThread
    replica: str
    started_at: float
    artefact: str | None
    shadow: str | None = None
    draining: bool = False
    processes: Mapping[str, messages.ProcessStatus] = field(default_factory=dict)
    table: ReplicaTable = field(init=False)
    discovery: Discovery = field(init=False)
    config_watcher: ConfigWatcher = field(init=False)
    token_watcher: TokenWatcher = field(init=False)
    registry_file: RegistryFile = field(init=False)
    batches: BatchProcess = field(init=False)
    shared: SharedAddress | None = field(init=False)
    workers: Workers = field(init=False)
    continuity: Continuity = field(init=False)
    predecessor: Predecessor = field(init=False)
    engines: EngineLoads = field(init=False)
    demand: DemandReport = field(init=False)
    lease: Lease | None = None
    own_metrics: Metrics = field(default_factory=Metrics)
    """The counts of this process itself."""
    _last_errors: dict[str, str] = field(default_factory=dict)
    _departure_rates: dict[str, DepartureRate] = field(default_factory=dict)
    _stats: dict[str, ReplicaStats] = field(default_factory=dict)
    _training: tuple[str, Mapping[str, Any]] = ("", {})
    _traffic: Traffic = field(default_factory=Traffic)
    _run_files: RunFiles = field(default_factory=RunFiles)
    _reading: asyncio.Future[RunFiles] | None = None
    _overview: tuple[float, dict[str, Any]] | None = None
    _overview_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _measuring: asyncio.Handle | None = None
    _usage: StampedFile[Usage] = field(init=False)

    def __post_init__(self) -> None:
        cluster = self.deployment.cluster
        self._usage = StampedFile(self.run.gpu_hours_json, parse_usage)
        self.continuity = Continuity(near_end_s=cluster.warn_s + cluster.drain_s)
        self.table = ReplicaTable(
            bounds=queue_limits(self.deployment), peers=self.counters.all(), order=self.counters.order_of_all(),
            on_change=self._table_changed,
        )  # fmt: skip
        self.workers = Workers(self.table, self.counters, self, self._settings(), self.deployment.experts)
        self.demand = DemandReport(self.run, self.replica, self.base, self.table, self.files, self._demand_counts)
        self.predecessor = Predecessor(self.replica, self.run.secret(), self.workers.sessions, self.continuity)
        self.workers.on_unknown_session = self.predecessor.fetch
        self.engines = EngineLoads(self.table, self.workers.publish_soon)
        self.batches = BatchProcess(
            self.run, self.files, replica=self.replica, leads=self._runs_batches,
            keep_days=lambda: self.deployment.router.batch.keep_days,
        )  # fmt: skip
        self.shared = shared_address(self.run, self.base.router)
        self.registry_file = RegistryFile(self.run, self.replica, self.files, self.shared)
        self.discovery = Discovery(
            self.run, self.deployment.router, self.table, on_snapshot=self._registry_read, files=self.files,
            clock=asyncio.get_running_loop().time, seeds=self.workers.seeds, on_ready=self._probed_ready,
            on_failure=self.task_failed, on_agent_failure=self._agent_task_failed,
        )  # fmt: skip
        self.config_watcher = ConfigWatcher(self.run, self.base, self.files, self._reconfigure, self.task_failed)
        self.token_watcher = TokenWatcher(self.run, self.files, self._tokens_changed, self.task_failed)

    @asynccontextmanager
    async def watching(self, present: Mapping[int, socket.socket]) -> AsyncIterator[None]:
        """Discovers and probes replicas within the block. `present`: sockets to the workers that are running
        already."""
        certificate = None if self.lease is None else self.lease.record.certificate
        renewals = CertificateWatcher(
            self.base.router, certificate, self.files, self._certificate_changed, self.task_failed
        )
        async with self.token_watcher.watching(), self._watching(present), renewals.watching():
            yield

    @asynccontextmanager
    async def _watching(self, present: Mapping[int, socket.socket]) -> AsyncIterator[None]:
        for worker, sock in present.items():
            await self.workers.attach(worker, sock)
        await self.workers.greeted(present)
        following = background("predecessor", self.predecessor.follow_forever, self.task_failed)
        limit = partial(limit_records_forever, self.run, self.files, lambda: self.deployment.router.records_gb)
        limiting = background("records", limit, self.task_failed)
        reading = background("engine metrics", self.engines.read_forever, self.task_failed)
        batches = background("batches", self.batches.run_forever, self.task_failed)
        demand = background("demand", self.demand.report_forever, self.task_failed)
        async with self.discovery, self.config_watcher.watching(), following, limiting, reading, demand, batches:
            if self.table.all():
                self._table_changed()
            try:
                yield
            finally:
                self.workers.close()

    def leave(self) -> None:
        """Called after the router's record was withdrawn, so that no new clients come: writes `registry.json` without
        this router, and tells the workers."""
        self.registry_file.leave()
        self.workers.release()

    def _runs_batches(self) -> bool:
        return self.registry_file.leads and not self.draining

    def task_failed(self, task: str, error: str) -> None:
        """Counts a failure of this process's background task, which is then started again, and records an event."""
        self.own_metrics.task_failures.add(task)
        self._record_failure(task, error)

    def worker_task_failed(self, task: str, error: str) -> None:
        """Records a failure of a worker's background task as an event. The worker itself counts the failure."""
        self._record_failure(task, error)

    def _agent_task_failed(self, replica: Replica, task: str, times: int, error: str) -> None:
        for _ in range(times):
            self.own_metrics.task_failures.add(task)
        self._record_failure(task, error, replica=replica.name, expert=split_replica(replica.name)[0])

    def _record_failure(self, task: str, error: str, *, replica: str | None = None, expert: str | None = None) -> None:
        self._last_errors[task] = error
        reason, named = f"{task}: {error}", replica or self.replica
        self.files.post(
            partial(self.run.event, "task_failed", replica=named, expert=expert, reason=reason, by=self.replica)
        )

    def answer(self, call: messages.Message) -> Awaitable[Any]:
        """Returns an awaitable whose result is the reply to a worker's call."""
        match call:
            case messages.GetStatus():
                return self.status()
            case messages.GetOverview():
                return self.overview()
            case messages.GetHandover(skip):
                return self.handover(skip)
            case messages.GetExposition():
                return self.exposition()
        raise ValueError(f"the control process does not handle {type(call).__name__}")

    async def handover(self, skip: int) -> dict[str, Any]:
        """Returns the body of `GET /handover`. `skip`: number of the newest session turns to leave out, because the
        caller has got them by earlier calls."""
        await self.workers.informed.wait()
        return handover_page(self.workers.sessions, self.continuity, skip=skip)

    async def take_over(self) -> None:
        """Before this router is ready, fetches the session turns and counts of an older router of the run. Takes at
        most `TAKE_OVER_S` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TAKE_OVER_S):
                self.predecessor.found(await self.files.run(RegistryReader(self.run.registry).snapshot))
                await self.predecessor.fetch()

    async def overview(self) -> dict[str, Any]:
        """Returns the body of `GET /overview`. A body is reused for `SAMPLE_S` seconds, so that many open pages cost
        little more than one."""
        async with self._overview_lock:
            now = asyncio.get_running_loop().time()
            if self._overview is None or now - self._overview[0] >= SAMPLE_S:
                counted = await self._counted()
                self._traffic.add(CounterSample.of(counted, now))
                await self._read_run_files()
                status = await self.status(counted)
                body = overview(
                    status, self._traffic, self._run_files, self.deployment, forecast=self.discovery.forecast.content,
                    queues=await self._queues(status["experts"]), at=time.time(),
                )  # fmt: skip
                self._overview = now, body
            return self._overview[1]

    async def _queues(self, experts: Iterable[str]) -> dict[str, Queues]:
        """Returns the waiting requests of each of these experts. Asks the workers for the oldest ones only if any
        request waits."""
        waiting = {name: [(of.label, self.table.class_waiting(name, of)) for of in CLASSES] for name in experts}
        oldest = {}
        if any(count for classes in waiting.values() for _, count in classes):
            oldest = await self.workers.oldest_waits()
        return {
            name: {label: {"waiting": count, "oldest_s": oldest.get((name, label))} for label, count in classes}
            for name, classes in waiting.items()
        }

    async def _read_run_files(self) -> None:
        """Reads the files of the run directory that the overview shows. If the file system hangs or fails, keeps what
        was read last."""
        if self._reading is None:
            read = partial(read_run_files, self.run.events, self._usage)
            self._reading = asyncio.ensure_future(self.files.run(read))
        await asyncio.wait({self._reading}, timeout=READ_S)
        if self._reading.done():
            with contextlib.suppress(OSError):
                self._run_files = self._reading.result()
            self._reading = None

    async def status(self, counted: Metrics | None = None) -> dict[str, Any]:
        """Returns the body of `GET /status`. `counted`: the counts of all workers; None: ask the workers for them."""
        await self.workers.informed.wait()
        policy = self.deployment.policy
        counted = counted or await self._counted()
        measured = await self._drift(counted)
        self.table.refresh_peer_counts(self.table.all())
        return status(
            self.table,
            self.discovery,
            experts=sorted(self.table.experts() | set(self.deployment.experts)),
            policy={
                "kind": policy.kind,
                "fallback": policy.fallback,
                "artefact": self.artefact,
                "shadow": policy.shadow,
                "drift": None if measured is None else measured.to_json(),
            },
            replica=self.replica,
            draining=self.draining,
            departure_rates=self._departure_rates,
            stats=self._stats,
            now=asyncio.get_running_loop().time(),
            in_flight=self.counters.total(IN_FLIGHT),
            max_in_flight=self.deployment.router.max_in_flight,
            uptime_s=round(time.time() - self.started_at, 3),
            open=self.deployment.router.open,
            settings_trouble=self.config_watcher.trouble,
            write_trouble=None if self.lease is None else self.lease.trouble,
            share_trouble=None if self.shared is None else self.shared.trouble,
            task_failures=[
                {"task": task, "count": count, "last_error": self._last_errors.get(task)}
                for (task,), count in counted.task_failures.items()
            ],
            workers=list(map(self._worker_status, self.workers.all)),
            control={"pid": os.getpid(), **self._process_status(CONTROL)},
        )

    def _worker_status(self, connection: WorkerConnection) -> dict[str, Any]:
        worker = connection.worker
        shown: dict[str, Any] = {"worker": worker, "pid": connection.pid, "serving": connection.serving.is_set()}
        shown["in_flight"] = self.counters.row(worker)[IN_FLIGHT]
        return shown | self._process_status(worker_name(worker))

    def _process_status(self, name: str) -> dict[str, Any]:
        known = self.processes.get(name)
        return {} if known is None else asdict(known)

    async def exposition(self) -> str:
        """Returns the body of `GET /metrics`, with the counts of all workers, including those that have ended."""
        await self.workers.informed.wait()
        counted = await self._counted()
        measured = await self._drift(counted)
        read = gauges(
            self.table,
            in_flight=self.counters.total(IN_FLIGHT),
            max_in_flight=self.deployment.router.max_in_flight,
            registry_age_s=self.discovery.registry_age_s(),
            workers=sum(connection.serving.is_set() for connection in self.workers.all),
        )
        drifted = () if measured is None else measured.gauges()
        used = usage_metrics(await self._read_usage())
        others = (*self.continuity.metrics(), *self.engines.metrics(), *drifted, *used)
        return counted.exposition((*read, *others)).decode()

    async def _read_usage(self) -> Usage | None:
        """Returns the experts' use of GPU time. If the file system fails or does not answer within `READ_S`, returns
        what was read last."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(READ_S):
                return await self.files.run(self._usage.read)
        return self._usage.value

    async def _counted(self) -> Metrics:
        """Returns the sum of the counts of this process and all workers."""
        counted = Metrics()
        for dump in (self.own_metrics.dump(), *await self.workers.metrics()):
            counted.absorb(dump)
        return counted

    async def _drift(self, counted: Metrics) -> Drift | None:
        """Returns the drift of the classifier in use. Returns None if the policy uses none, if it has decided nothing
        yet, or if the record of its training cannot be read."""
        if self.artefact is None:
            return None
        if self._training[0] != self.artefact:
            folder = artefact_folder(self.run, self.deployment)
            try:
                self._training = await self.files.run(partial(read_training, folder))
            except HpcRouterError:  # the file is being replaced or is unreadable; the workers have loaded theirs
                return None
        version, training = self._training
        return drift(counted.decided.items(), artefact=version, training=training)

    def counted(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Takes one worker's report of its counts into the departure rates of the queues and the statistics of the
        replicas. `before`, `now`: the worker's dumped metrics at its previous report and at this one."""
        earlier, at = departures(before), asyncio.get_running_loop().time()
        for expert, count in departures(now).items():
            rate, more = self._departure_rates.setdefault(expert, DepartureRate()), count - earlier.get(expert, 0)
            if more > 0:
                if rate.per_s(at) is None:
                    rate.began(at - messages.REPORT_S)
                rate.left(at, more)
        for name, (answered, seconds, errors) in increase(totals_by_replica(now), totals_by_replica(before)).items():
            self._stats.setdefault(name, ReplicaStats()).add(answered, seconds, errors, now=at)
            if answered:
                self.discovery.served(name)
        for name in [name for name in self._stats if self.table.get(name) is None]:
            del self._stats[name]

    def _demand_counts(self) -> DemandCounts:
        dumps = [connection.metrics for connection in self.workers.all]
        return DemandCounts(counts_by_expert(dumps), self._departure_rates)

    def observed(self, observation: messages.ReplicaObservation) -> None:
        """Passes on to `discovery` what a worker's request observed of a replica, unless the replica has restarted
        since then."""
        replica, trouble = self.table.get(observation.replica), observation.trouble or ""
        if replica is None or replica.record.nonce != observation.nonce:
            return
        match observation.incident:
            case Incident.NO_CONNECTION:
                self.discovery.connect_failed(replica, trouble)
            case Incident.ERROR:
                self.discovery.request_failed(replica, trouble)
            case Incident.ANSWERED:
                self.discovery.request_succeeded(replica)
            case _ if observation.event is not None:
                self.discovery.state_reported(replica, observation.event)
            case _:
                self.discovery.recheck(replica)

    def _reconfigure(self, deployment: Deployment, policy: Policy) -> None:
        before = self._settings()
        self.deployment = deployment
        self.artefact, self.shadow = versions(policy)
        settings = self._settings()
        if settings != before:
            logger.info("settings have changed, artefact %s", policy.version)
            self.discovery.configure(deployment.router)
            self.table.bounds = queue_limits(deployment)
            self.workers.configure(settings)

    def _tokens_changed(self, tokens: tuple[UserToken, ...]) -> None:
        self.workers.set_tokens(messages.UserTokensChanged(tokens))

    def _certificate_changed(self, certificate: str) -> None:
        assert self.lease is not None
        self.lease.change(certificate=certificate)
        self.workers.notify(messages.CertificateChanged())

    def _settings(self) -> messages.Settings:
        deployment = self.deployment
        return messages.Settings(
            deployment.policy, deployment.router, self.artefact, self.shadow, scaled_to_zero(deployment)
        )

    def _probed_ready(self, replica: Replica) -> None:
        if any(self.table.waiting(expert) for expert in replica.record.serves):
            self.workers.notify(messages.ReplicaWell(replica.name))

    def _registry_read(self, records: Mapping[str, Record]) -> None:
        self.registry_file.keep(records)
        self.predecessor.found(records)
        self.workers.publish_changes()

    def _table_changed(self) -> None:
        """Schedules the update of `continuity` and the next snapshot for the end of the present step of the event loop.
        So all changes of one read of the registry, such as a draining replica and its ready successor, are handled
        together."""
        if self._measuring is None:
            self._measuring = asyncio.get_running_loop().call_soon(self._measure)
        self.workers.publish_soon()

    def _measure(self) -> None:
        self._measuring = None
        self.continuity.update(self.table)
