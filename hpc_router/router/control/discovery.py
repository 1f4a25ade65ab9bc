"""Keeps the replica table current: reads the registry and probes every endpoint.

The registry says which replicas exist. A probe says whether the process there answers and is the expected one: an agent
proves its key (`prober`). An external endpoint counts as alive after any HTTP response, to a probe or to a request. If
it accepts connections but sends no response, it may be slow or hang; it is then used only while no other replica serves
its experts.

A replica whose heartbeats stop is not ejected while its probes succeed, because then only its file system has stalled.
A replica leaves the table when its owner withdraws its record. This module does not know the workers.
"""

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from hpc_router import backoff
from hpc_router.background_tasks import OnFailure, restarting
from hpc_router.config.schema import RouterConfig
from hpc_router.net.auth import replica_key
from hpc_router.router.control.prober import EXTERNAL_PROBE_S, Prober
from hpc_router.router.replicas.health import EjectionRules, Incident, Verdict, can_eject
from hpc_router.router.replicas.replica import Event, Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.forecast import ForecastReader
from hpc_router.state.io_thread import FileThread
from hpc_router.state.registry import Record, RecordKind, RegistryReader
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

SILENT_BEATS: Final = 4
"""A replica is silent if its last heartbeat is older than this many heartbeat intervals."""
_EJECTED_PROBE_MAX_S: Final = 15.0
"""Maximum interval in seconds between two probes of an ejected replica."""
_SLOW: Final = 4
"""Factor of the time that a probe waits for an external endpoint which other replicas stand in for, so that a slow one
comes back."""


@dataclass(slots=True)
class Beats:
    """The beat counter of a record, and the time of its last change on this process's clock."""

    beat: int | None
    changed_at: float

    def silent_s(self, now: float) -> float:
        """Returns the seconds since the last beat."""
        return now - self.changed_at


@dataclass(slots=True)
class _ReplicaWatch:
    """The probe task of one endpoint, and the data that it uses.

    `recheck` is set to make the task probe now. `served_at`: time at which the replica last answered a request.
    `answer_s`: duration in seconds of the last probe that the replica answered. `task_failures`: by background task of
    the replica's agent, the number of its failures that the last probe reported.
    """

    task: asyncio.Task[None]
    recheck: asyncio.Event
    beats: Beats
    served_at: float = -math.inf
    answer_s: float = 0.0
    task_failures: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Discovery:
    """Discovers and probes the replicas within `async with`. It runs one background task for the registry and one per
    endpoint. `on_snapshot` is called with all records after each reading of the registry. `forecast`: `forecast.json`,
    as it was read together with the registry."""

    run: RunDir
    config: RouterConfig
    table: ReplicaTable
    on_snapshot: Callable[[Mapping[str, Record]], None]
    clock: Callable[[], float]
    files: FileThread
    last_read_at: float = field(init=False)
    _watches: dict[str, _ReplicaWatch] = field(default_factory=dict)
    _scan: asyncio.Task[None] | None = None
    _prober: Prober | None = None
    _secret: str = ""
    _rules: EjectionRules = field(init=False)
    forecast: ForecastReader = field(init=False)

    seeds: dict[str, Replica] = field(default_factory=dict)
    """Replicas that were known before this process started."""
    on_ready: Callable[[Replica], None] | None = None
    """Called after each probe that finds a replica ready."""
    on_failure: OnFailure = lambda task, error: None
    on_agent_failure: Callable[[Replica, str, int, str], None] = lambda replica, task, count, error: None
    """Called with a replica, a background task of its agent, the number of its failures since the last probe, and the
    last error."""

    def __post_init__(self) -> None:
        self.last_read_at = self.clock()
        self.forecast = ForecastReader(self.run)
        self.configure(self.config)

    def configure(self, config: RouterConfig) -> None:
        """Applies this config to later probes and ejections."""
        self.config = config
        if self._prober is not None:
            self._prober.timeout_s = config.probe_timeout_s
        self._rules = EjectionRules(
            connect_errors=config.eject_connect_errors,
            request_errors=config.eject_errors,
            exclusion_s=config.eject_s,
            max_exclusion_s=config.eject_most_s,
            max_share=config.eject_share,
        )

    async def __aenter__(self) -> "Discovery":
        self._prober = Prober(self.run, self.files, self.config.probe_timeout_s, self._report_task_failures)
        self._secret = self.run.secret()
        for known in tuple(self.seeds.values()):
            self._watch(known.record)
        scan = restarting("registry scan", self._scan_forever, self.on_failure)
        self._scan = asyncio.create_task(scan, name="registry scan")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._scan is not None
        assert self._prober is not None
        tasks = [self._scan, *(watch.task for watch in self._watches.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._prober.session.close()

    def connect_failed(self, replica: Replica, trouble: str) -> None:
        """Records that a request could not connect to the replica, and probes it soon. The configured `EjectionRules`
        decide whether this ejects the replica."""
        replica.trouble = trouble
        self._record(replica, Incident.NO_CONNECTION)
        self.recheck(replica)

    def request_failed(self, replica: Replica, trouble: str) -> None:
        """Records that a request got an error response or none from the replica, and probes the replica soon."""
        replica.recent_error, replica.trouble = True, trouble
        self._record(replica, Incident.ERROR)
        self.recheck(replica)

    def request_succeeded(self, replica: Replica) -> None:
        """Records that the replica served a request, after earlier requests to it had failed."""
        replica.recent_error = False
        self._record(replica, Incident.ANSWERED)

    def state_reported(self, replica: Replica, event: Event) -> None:
        """Applies the state that the replica reported in the response to a request, and probes it soon."""
        self._apply(replica, event)
        self.recheck(replica)

    def served(self, name: str) -> None:
        """Records that the replica `name` has answered requests recently. The caller counts them in intervals."""
        if watch := self._watches.get(name):
            watch.served_at = self.clock()

    def recheck(self, replica: Replica) -> None:
        """Requests a probe of the replica now."""
        if watch := self._watches.get(replica.name):
            watch.recheck.set()

    def is_silent(self, replica: Replica) -> bool:
        """Returns whether the replica's heartbeats have stopped. False for an endpoint that sends none."""
        watch = self._watches.get(replica.name)
        if watch is None or replica.record.beat_s is None:
            return False
        return watch.beats.silent_s(self.clock()) > SILENT_BEATS * replica.record.beat_s

    def registry_age_s(self) -> float:
        """Returns the seconds since the registry was last read, or since the start."""
        return self.clock() - self.last_read_at

    async def _scan_forever(self) -> None:
        reader = RegistryReader(self.run.registry)
        while True:
            try:
                snapshot = await self.files.run(reader.snapshot)
                await self.files.run(self.forecast.read)
                self.table.forecasts = self.forecast.experts
                self.last_read_at = self.clock()
                await self._apply_records(snapshot)
                self.on_snapshot(snapshot)
            except OSError as error:
                logger.warning("the registry cannot be read, so its last records are used: %s", error)
            await asyncio.sleep(self.config.discovery_s)

    async def _apply_records(self, snapshot: Mapping[str, Record]) -> None:
        for name, record in snapshot.items():
            if record.kind is not RecordKind.ROUTER:
                self._apply_record(name, record)
        for name in [name for name in self._watches if name not in snapshot]:
            logger.info("%s: its record was withdrawn", name)
            await self._forget(name)

    def _apply_record(self, name: str, record: Record) -> None:
        replica, watch = self.table.get(name), self._watches.get(name)
        if replica is None or watch is None or not replica.is_at(record):
            if watch is not None:
                watch.task.cancel()
            self._watch(record)
            return
        state_changed = replica.record.state is not record.state
        if watch.beats.beat != record.beat:
            watch.beats = Beats(record.beat, self.clock())
        self.table.renew(replica, record)
        if state_changed:
            watch.recheck.set()

    def _watch(self, record: Record) -> None:
        key = None if record.kind is RecordKind.EXTERNAL else replica_key(self._secret, record.nonce or "")
        replica = Replica(record, key)
        known = self.seeds.pop(record.replica, None)
        if known is not None and known.is_at(record):
            replica = known
        self.table.put(replica)
        recheck = asyncio.Event()
        watching = restarting("probe", partial(self._probe_forever, replica, recheck), self.on_failure)
        task = asyncio.create_task(watching, name=f"probe {record.replica}")
        self._watches[record.replica] = _ReplicaWatch(task, recheck, Beats(record.beat, self.clock()))
        logger.info("%s discovered at %s", record.replica, record.url)

    async def _forget(self, name: str) -> None:
        self.table.remove(name)
        watch = self._watches.pop(name)
        watch.task.cancel()
        await asyncio.gather(watch.task, return_exceptions=True)  # waits for the end of the cancelled task

    async def _probe_forever(self, replica: Replica, recheck: asyncio.Event) -> None:
        while True:
            await self._judge(replica)
            recheck.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s(replica)):
                    await recheck.wait()

    def _pause_s(self, replica: Replica) -> float:
        base = self.config.probe_s
        if replica.state is RoutingState.STARTING:
            base /= 2
        elif replica.state is RoutingState.EJECTED:
            failed = min(replica.health.failed_probes, 8)
            base = backoff.pause_s(failed, first_s=base, max_s=_EJECTED_PROBE_MAX_S, factor=1.5)
        return base * random.uniform(0.8, 1.2)  # spreads the probes of many replicas

    async def _judge(self, replica: Replica) -> None:
        """Probes the replica and applies the result to its state. External endpoints are judged more mildly: an
        unanswered probe has no effect if the endpoint has answered requests since the probe began, and one that accepts
        the connection but sends no response is ejected only if each of its experts has another ready replica."""
        started_at, watch = self.clock(), self._watches[replica.name]
        assert self._prober is not None
        result = await self._prober.probe(replica, external_s=self._external_limit_s(replica, watch))
        unanswered = result in (Incident.PROBE_LATE, Incident.PROBE_UNANSWERED)
        if unanswered and replica.record.kind is RecordKind.EXTERNAL and watch.served_at >= started_at:
            replica.trouble = None
            return
        if result is Incident.PROBE_UNANSWERED and not self._is_dispensable(replica):
            result = Event.SAYS_READY  # it takes connections, and the alternative is no replica at all
        elif isinstance(result, Incident):
            self._record(replica, result)
            return
        else:
            watch.answer_s = self.clock() - started_at
            self._record(replica, Incident.PROBE_OK)
            if result is Event.SAYS_READY and replica.health.is_excluded(self.clock()):
                return
            if not replica.recent_error:
                replica.trouble = None
        self._apply(replica, result)
        if replica.state is RoutingState.READY:
            self.table.offer(replica, ignore_avoid=True)
            if self.on_ready is not None:
                self.on_ready(replica)

    def _external_limit_s(self, replica: Replica, watch: _ReplicaWatch) -> float:
        """Returns how long a probe waits for the response of an external endpoint, in seconds: `EXTERNAL_PROBE_S`, or
        twice the duration of the last answered probe if that is longer. For an endpoint that nobody needs now, because
        it is not ready and each of its experts has another ready replica, it is at least `_SLOW` times as long."""
        slow = replica.state is not RoutingState.READY and self._is_dispensable(replica)
        return max(EXTERNAL_PROBE_S * (_SLOW if slow else 1), 2 * watch.answer_s)

    def _is_dispensable(self, replica: Replica) -> bool:
        """Returns whether each of the replica's experts has another ready replica."""
        return all(
            any(other.state is RoutingState.READY for other in self.table.of(expert) if other is not replica)
            for expert in replica.record.serves
        )

    def _report_task_failures(self, replica: Replica, failures: Mapping[str, tuple[int, str]]) -> None:
        watch = self._watches.get(replica.name)
        if watch is None:
            return
        for task, (count, error) in failures.items():
            more = count - watch.task_failures.get(task, 0)
            watch.task_failures[task] = count
            if more > 0:
                self.on_agent_failure(replica, task, more, error)

    def _record(self, replica: Replica, incident: Incident) -> None:
        """Counts the incident for the replica's health; ejects or excludes the replica if that is the verdict."""
        now = self.clock()
        spare = incident is Incident.ERROR and all(self._can_spare(replica, e, now) for e in replica.record.serves)
        match replica.health.record(incident, now=now, rules=self._rules, spare=spare):
            case Verdict.EJECT:
                self._apply(replica, Event.FAILED)
            case Verdict.EXCLUDE:
                self._apply(replica, Event.EXCLUDED)

    def _can_spare(self, replica: Replica, expert: str, now: float) -> bool:
        others = [r for r in self.table.of(expert) if r is not replica]
        states = [(r.state is RoutingState.READY, r.health.is_excluded(now)) for r in others]
        return can_eject(others=states, share=self._rules.max_share)

    def _apply(self, replica: Replica, event: Event) -> None:
        if self.table.get(replica.name) is replica and self.table.apply(replica, event):
            because = f" ({replica.trouble})" if replica.trouble and replica.state is RoutingState.EJECTED else ""
            logger.info("%s is %s%s", replica.name, replica.state, because)
