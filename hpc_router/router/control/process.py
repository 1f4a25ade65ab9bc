"""What the router does once, however many workers it has: watch the replicas, add up what the workers count.

It discovers and probes, and sends its workers the replicas' view whenever that changes. `/status` and `/metrics` are
told here, so they say the same whichever worker is asked. It owns nothing that it could not ask its workers for: one
that takes the place of another begins with what they know, and until then they go on with the last view.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

from hpc_router.config.schema import Deployment
from hpc_router.errors import HpcRouterError
from hpc_router.router.control.config_watcher import Changes
from hpc_router.router.control.discovery import Discovery
from hpc_router.router.control.drift import Drift, drift
from hpc_router.router.control.registry_file import RegistryFile
from hpc_router.router.control.replica_stats import ReplicaStats, newly, totals
from hpc_router.router.control.status import status
from hpc_router.router.ipc.rpc import ChannelClosedError, RpcPeer
from hpc_router.router.ipc.shared_counters import IN_FLIGHT, Counters
from hpc_router.router.ipc.supervisor import CONTROL, worker_name
from hpc_router.router.metrics import Metrics, departures, gauges
from hpc_router.router.policies import artefact_folder
from hpc_router.router.replicas.admission import DepartureRate, bounds_of
from hpc_router.router.replicas.health import Incident
from hpc_router.router.replicas.replica import Event, Replica, RoutingState
from hpc_router.router.replicas.sessions import Sessions, Turn
from hpc_router.router.replicas.snapshot import View, give_columns, take_over, view_of
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker.control_client import REPORT_S
from hpc_router.routing.artefact import read_training
from hpc_router.routing.policy import Policy, versions
from hpc_router.state.io_thread import FileThread
from hpc_router.state.lease import Lease
from hpc_router.state.registry import Record, split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

HELLO_S: Final = 1.0
"""Workers that are there already are given so long to tell what they know."""
ANSWER_S: Final = 1.0
"""And so long to say what they have counted."""


@dataclass(slots=True)
class Member:
    """A worker. `number` of the view it was sent last, and whether it has `taken` it; `said` counts its reports."""

    worker: int
    channel: RpcPeer | None = None
    greeted: asyncio.Event = field(default_factory=asyncio.Event)
    serving: asyncio.Event = field(default_factory=asyncio.Event)
    pid: int | None = None
    said: int = 0
    taken: bool = True
    stale: bool = False
    counted: Mapping[str, Any] = field(default_factory=dict)

    def tell(self, kind: str, value: Any = None) -> None:
        if self.channel is not None:
            self.channel.tell(kind, value)


@dataclass(slots=True)
class ControlProcess:
    """`base`: the deployment that the router was started with, `deployment`: with the settings made since then;
    `started_at`: when the router began; `processes`: what the supervisor says of each, by name."""

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
    processes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    table: ReplicaTable = field(init=False)
    discovery: Discovery = field(init=False)
    changes: Changes = field(init=False)
    keeper: RegistryFile = field(init=False)
    sessions: Sessions = field(default_factory=Sessions)
    members: list[Member] = field(init=False)
    lease: Lease | None = None
    own: Metrics = field(default_factory=Metrics)
    """What this process counts itself."""
    _errors: dict[str, str] = field(default_factory=dict)
    _owners: dict[str, int] = field(default_factory=dict)
    _seeds: dict[str, Replica] = field(default_factory=dict)
    _paces: dict[str, DepartureRate] = field(default_factory=dict)
    _recent: dict[str, ReplicaStats] = field(default_factory=dict)
    _view: View | None = None
    _trained: tuple[str, Mapping[str, Any]] = ("", {})
    _number: int = 0
    _due: asyncio.Handle | None = None
    _informed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.table = ReplicaTable(bounds=bounds_of(self.deployment), peers=self.counters.all(), on_change=self._changed)
        self.keeper = RegistryFile(self.run, self.replica, self.files)
        self.discovery = Discovery(
            self.run, self.deployment.router, self.table, on_snapshot=self._looked, files=self.files,
            clock=asyncio.get_running_loop().time, seeds=self._seeds, on_well=self._well,
            on_failure=self.task_failed, on_agent_failure=self._agent_task_failed,
        )  # fmt: skip
        self.changes = Changes(self.run, self.base, self.files, self._take_over, self.task_failed)
        self.members = [Member(worker) for worker in range(self.counters.workers)]

    @asynccontextmanager
    async def watching(self, present: Mapping[int, socket.socket]) -> AsyncIterator[None]:
        """Discover and probe until the end of the block. `present`: the way to the workers that are there already."""
        for worker, sock in present.items():
            await self.attach(worker, sock)
        await _all(self.members[worker].greeted for worker in present)
        async with self.discovery, self.changes.watching():
            if self.table.all():
                self._changed()
            try:
                yield
            finally:
                for member in self.members:
                    if member.channel is not None:
                        member.channel.close()

    async def attach(self, worker: int, sock: socket.socket) -> None:
        """A way to a worker that has just begun, or that has lost its control process."""
        member = self.members[worker]
        if member.channel is not None:
            member.channel.close()
        member.serving.clear()
        channel = RpcPeer(partial(self._take, member), lambda: self._detach(member, channel))
        member.channel, member.taken, member.stale, member.said = channel, True, False, 0
        await channel.open(sock)

    async def served(self, *, limit_s: float) -> None:
        """Until all workers serve, or the time is over."""
        await _all((member.serving for member in self.members), limit_s=limit_s)

    def leave(self) -> None:
        """The record has been withdrawn: nobody is sent here any more."""
        self.keeper.leave()
        for member in self.members:
            member.tell("release")

    def task_failed(self, task: str, error: str) -> None:
        """A background task of this process failed and starts again."""
        self.own.task_failures.add(task)
        self._record_failure(task, error)

    def _agent_task_failed(self, replica: Replica, task: str, times: int, error: str) -> None:
        for _ in range(times):
            self.own.task_failures.add(task)
        self._record_failure(task, error, replica=replica.name, expert=split_replica(replica.name)[0])

    def _record_failure(self, task: str, error: str, *, replica: str | None = None, expert: str | None = None) -> None:
        self._errors[task] = error
        reason, named = f"{task}: {error}", replica or self.replica
        self.files.post(
            partial(self.run.event, "task_failed", replica=named, expert=expert, reason=reason, by=self.replica)
        )

    async def status(self) -> dict[str, Any]:
        await self._informed.wait()
        policy = self.deployment.policy
        counted = await self._counted()
        seen = await self._drift(counted)
        self.table.look(self.table.all())
        return status(
            self.table,
            self.discovery,
            experts=sorted(self.table.experts() | set(self.deployment.experts)),
            policy={
                "kind": policy.kind,
                "fallback": policy.fallback,
                "artefact": self.artefact,
                "shadow": policy.shadow,
                "drift": None if seen is None else seen.to_json(),
            },
            replica=self.replica,
            draining=self.draining,
            paces=self._paces,
            recent=self._recent,
            now=asyncio.get_running_loop().time(),
            in_flight=self.counters.total(IN_FLIGHT),
            max_in_flight=self.deployment.router.max_in_flight,
            uptime_s=round(time.time() - self.started_at, 3),
            open=self.deployment.router.open,
            settings_trouble=self.changes.trouble,
            write_trouble=None if self.lease is None else self.lease.trouble,
            task_failures=[
                {"task": task, "count": count, "last_error": self._errors.get(task)}
                for (task,), count in counted.task_failures.items()
            ],
            workers=list(map(self._worker_status, self.members)),
            control={"pid": os.getpid(), **self.processes.get(CONTROL, {})},
        )

    def _worker_status(self, member: Member) -> dict[str, Any]:
        seen: dict[str, Any] = {"worker": member.worker, "pid": member.pid, "serving": member.serving.is_set()}
        seen["in_flight"] = self.counters.row(member.worker)[IN_FLIGHT]
        return seen | dict(self.processes.get(worker_name(member.worker), {}))

    async def metrics(self) -> str:
        """Of all workers, those included that have ended."""
        await self._informed.wait()
        counted = await self._counted()
        seen = await self._drift(counted)
        read = gauges(
            self.table,
            in_flight=self.counters.total(IN_FLIGHT),
            max_in_flight=self.deployment.router.max_in_flight,
            registry_age_s=self.discovery.registry_age_s(),
            workers=sum(member.serving.is_set() for member in self.members),
        )
        return counted.exposition((*read, *(() if seen is None else seen.gauges()))).decode()

    async def _counted(self) -> Metrics:
        await asyncio.gather(*map(self._count, self.members))
        counted = Metrics()
        counted.absorb(self.own.dump())
        for member in self.members:
            counted.absorb(member.counted)
        return counted

    async def _drift(self, counted: Metrics) -> Drift | None:
        if self.artefact is None:
            return None
        if self._trained[0] != self.artefact:
            folder = artefact_folder(self.run, self.deployment)
            try:
                self._trained = await self.files.run(partial(read_training, folder))
            except HpcRouterError:  # it is being replaced, or unreadable: the routers decide from memory
                return None
        version, training = self._trained
        return drift(counted.decided.items(), artefact=version, training=training)

    def _measure(self, member: Member, counted: Mapping[str, Any]) -> None:
        """Take what a worker has counted; the queues' pace is in it."""
        before, now = departures(member.counted), asyncio.get_running_loop().time()
        for expert, count in departures(counted).items():
            pace, more = self._paces.setdefault(expert, DepartureRate()), count - before.get(expert, 0)
            if more > 0:
                if pace.per_s(now) is None:
                    pace.began(now - REPORT_S)
                pace.left(now, more)
        for name, (answered, seconds, errors) in newly(totals(counted), totals(member.counted)).items():
            self._recent.setdefault(name, ReplicaStats()).add(answered, seconds, errors, now=now)
            if answered:
                self.discovery.served(name)
        for name in [name for name in self._recent if self.table.get(name) is None]:
            del self._recent[name]
        member.counted = counted

    async def recall(self, session: str) -> list[Any] | None:
        """Where the session's last turn was answered. What a worker told before it answered its client is there by
        then, however busy we are: each is asked, and has nothing to say but what it told before."""
        await self._informed.wait()
        await asyncio.gather(*(self._ask(member, "sync") for member in self.members))
        turn = self.sessions.find(session)
        return None if turn is None else turn.to_json()

    def _take(self, member: Member, kind: str, value: Any) -> Awaitable[Any] | Any:
        match kind:
            case "hello":
                self._greet(member, value)
            case "serving":
                member.serving.set()
            case "taken":
                member.taken = True
                if member.stale:
                    self._send(member)
            case "saw":
                self._hear(member, *value)
            case "turn":
                self._learn(member, *value)
            case "metrics":
                self._measure(member, value)
            case "task failed":
                self._record_failure(*value)
            case "recall":
                return self.recall(value)
            case "status":
                return self.status()
            case "metrics of all":
                return self.metrics()
            case _:
                raise ValueError(f"the control process knows no {kind!r}")
        return None

    def _greet(self, member: Member, hello: Mapping[str, Any]) -> None:
        """A worker that takes the place of another goes on with what that one had counted and served."""
        replaced = member.pid not in (None, hello["pid"])
        member.pid = hello["pid"]
        if replaced:
            turns = [[s, turn.to_json()] for s, turn in self.sessions if self._owners.get(s) == member.worker]
            member.tell("inherit", {"metrics": member.counted, "turns": turns})
        else:
            member.counted = hello["metrics"]
        for session, turn in hello["turns"]:
            self._learn(member, session, turn)
        member.tell("settings", self._settings())
        if hello["view"] is not None and self._view is None:
            self._seed(hello["view"])
            self.table.queues = {**hello["queues"], **self.table.queues}
        if hello["serving"]:
            member.serving.set()
        member.greeted.set()
        self._send(member)

    def _take_over(self, deployment: Deployment, policy: Policy) -> None:
        """What holds from now on."""
        before = self._settings()
        self.deployment = deployment
        self.artefact, self.shadow = versions(policy)
        if self._settings() != before:
            logger.info("settings have changed, artefact %s", policy.version)
            self.discovery.configure(deployment.router)
            self.table.bounds = bounds_of(deployment)
            for member in self.members:
                member.tell("settings", self._settings())

    def _settings(self) -> dict[str, Any]:
        deployment = self.deployment
        return {
            "policy": asdict(deployment.policy),
            "router": asdict(deployment.router),
            "artefact": self.artefact,
            "shadow": self.shadow,
        }

    def _seed(self, view: View) -> None:
        """From several workers: what any of them has found not to answer, does not."""
        told = ReplicaTable()
        take_over(told, view)
        for replica in told.all():
            known = self._seeds.get(replica.name)
            if known is None or replica.standing is RoutingState.EJECTED:
                self._seeds[replica.name] = replica

    def _learn(self, member: Member, session: str, turn: list[Any]) -> None:
        self.sessions.learn(session, Turn.from_json(turn))
        self._owners[session] = member.worker
        if len(self._owners) > 2 * self.sessions.most:
            self._owners = {s: self._owners[s] for s, _ in self.sessions if s in self._owners}

    def _hear(
        self, member: Member, said: int, name: str, nonce: str | None, seen: str | None, trouble: str | None
    ) -> None:
        member.said, member.stale = said, True
        replica = self.table.get(name)
        if replica is not None and replica.record.nonce == nonce:
            match seen:
                case Incident.NO_CONNECTION:
                    self.discovery.doubt(replica, trouble or "")
                case Incident.ERROR:
                    self.discovery.erred(replica, trouble or "")
                case Incident.ANSWERED:
                    self.discovery.answered(replica)
                case None:
                    self.discovery.look_again(replica)
                case event:
                    self.discovery.heard(replica, Event(event))
        if seen is not None:
            self._changed()

    def _well(self, replica: Replica) -> None:
        """Whoever waits and had avoided it may have it."""
        if any(self.table.waiting(expert) for expert in replica.record.serves):
            for member in self.members:
                member.tell("well", replica.name)

    def _looked(self, snapshot: Mapping[str, Record]) -> None:
        self.keeper.keep(snapshot)
        if self._view is None or self._view != self._told():
            self._publish()

    def _changed(self) -> None:
        """Once the present step is over, whatever else changes in it."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_soon(self._publish)

    def _publish(self) -> None:
        self._due = None
        view = self._told()
        changed = view != self._view
        self._view = view
        self._informed.set()
        for member in self.members:
            if changed or member.stale:
                self._send(member)

    def _told(self) -> View:
        give_columns(self.table, self.counters, experts=self.deployment.experts)
        return view_of(self.table)

    def _send(self, member: Member) -> None:
        """One after the other: a worker that is slow gets the newest, not all of them."""
        if self._view is None or not member.greeted.is_set():
            return
        member.stale = not member.taken
        if member.taken:
            self._number += 1
            member.taken = False
            value = {"number": self._number, "heard": member.said, "replicas": self._view, "queues": self.table.queues}
            member.tell("view", value)

    async def _count(self, member: Member) -> None:
        counted = await self._ask(member, "metrics")
        if counted is not None:
            member.counted = counted

    async def _ask(self, member: Member, kind: str) -> Any:
        """None when it does not answer."""
        if member.channel is None:
            return None
        try:
            return await member.channel.ask(kind, limit_s=ANSWER_S)
        except ChannelClosedError:
            return None

    def _detach(self, member: Member, channel: RpcPeer) -> None:
        if member.channel is channel:
            member.channel = None
            member.serving.clear()
            member.greeted.clear()


async def _all(events: Iterable[asyncio.Event], *, limit_s: float = HELLO_S) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    if waits:
        _, late = await asyncio.wait(waits, timeout=limit_s)
        for wait in late:
            wait.cancel()
