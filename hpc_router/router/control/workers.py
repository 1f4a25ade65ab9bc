"""The control process's connections to its workers.

Each worker gets the settings and, after each change, the snapshot of all replicas. It reports its observations of
replicas, its session turns and its counts. Counts and turns are kept here, so that a worker that replaces a dead one
gets them back. A control process that has just started gets the states of the replicas from the workers. The owner of
the connections (`WorkerEvents`) decides how to react to observations and counts.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from hpc_router.router.ipc import messages
from hpc_router.router.ipc.rpc import ChannelClosedError, RpcPeer
from hpc_router.router.ipc.shared_counters import Counters
from hpc_router.router.replicas.replica import NO_COLUMN, Replica, RoutingState
from hpc_router.router.replicas.sessions import Sessions, Turn
from hpc_router.router.replicas.snapshot import ReplicaSnapshot, apply_snapshot, snapshot_of
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.forecast import StartForecast

HELLO_S: Final = 1.0
"""Maximum time in seconds that a control process that has just started waits for the workers' `Hello`."""
CALL_TIMEOUT_S: Final = 1.0
"""Timeout in seconds of a call to a worker."""

R = TypeVar("R")


class WorkerEvents(Protocol):
    """What the owner of the connections does with the workers' reports. Implemented by `ControlProcess`."""

    def observed(self, observation: messages.ReplicaObservation) -> None: ...
    def counted(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None: ...
    def worker_task_failed(self, task: str, error: str) -> None: ...
    def answer(self, call: messages.Message) -> Awaitable[Any]: ...


@dataclass(slots=True)
class WorkerConnection:
    """The connection to one worker.

    `greeted` is set by the worker's `Hello`. `applied`: whether the worker has applied the snapshot that was last sent
    to it; `stale`: whether it needs a newer snapshot. `observed`: number of the last observation that the worker has
    reported. `metrics`: its last known counts, including those of earlier processes with its number.
    """

    worker: int
    channel: RpcPeer | None = None
    greeted: asyncio.Event = field(default_factory=asyncio.Event)
    serving: asyncio.Event = field(default_factory=asyncio.Event)
    pid: int | None = None
    observed: int = 0
    applied: bool = True
    stale: bool = False
    metrics: messages.MetricsDump = field(default_factory=dict)

    def notify(self, message: messages.Message) -> None:
        if self.channel is not None:
            self.channel.notify(message)

    async def call(self, call: messages.Call[R]) -> R | None:
        """Returns the worker's reply; None if it does not answer in time."""
        if self.channel is None:
            return None
        try:
            return await self.channel.call(call, timeout_s=CALL_TIMEOUT_S)
        except ChannelClosedError:
            return None


@dataclass(slots=True)
class Workers:
    """The connections to all workers, and the data that the workers have sent.

    `experts`: the configured experts, which have a queue column even without a replica. `seeds`: the replicas that the
    workers knew when this process started. `tokens`: the users' tokens; None until they are read: the workers then keep
    the tokens that they have. `informed` is set when the first snapshot is sent. `on_unknown_session` is awaited when a
    request names a session of which no worker has served a turn.
    """

    table: ReplicaTable
    counters: Counters
    events: WorkerEvents
    settings: messages.Settings
    experts: Iterable[str] = ()
    sessions: Sessions = field(default_factory=Sessions)
    seeds: dict[str, Replica] = field(default_factory=dict)
    tokens: messages.UserTokensChanged | None = None
    on_unknown_session: Callable[[], Awaitable[None]] | None = None
    informed: asyncio.Event = field(default_factory=asyncio.Event)
    all: list[WorkerConnection] = field(init=False)
    _session_workers: dict[str, int] = field(default_factory=dict)
    _snapshot: tuple[ReplicaSnapshot, ...] | None = None
    _forecasts: dict[str, StartForecast] = field(default_factory=dict)
    _publishing: asyncio.Handle | None = None

    def __post_init__(self) -> None:
        self.all = [WorkerConnection(worker) for worker in range(self.counters.workers)]

    async def attach(self, worker: int, sock: socket.socket) -> None:
        """Connects over `sock` to a worker that has just started, or that has lost its control process."""
        connection = self.all[worker]
        if connection.channel is not None:
            connection.channel.close()
        connection.serving.clear()
        channel = RpcPeer(partial(self._receive, connection), lambda: self._detach(connection, channel))
        connection.channel, connection.applied, connection.stale, connection.observed = channel, True, False, 0
        await channel.open(sock)

    async def greeted(self, workers: Iterable[int]) -> None:
        """Waits until these workers have sent their `Hello`, for at most `HELLO_S`."""
        await _wait_all((self.all[worker].greeted for worker in workers), timeout_s=HELLO_S)

    async def served(self, *, timeout_s: float) -> None:
        """Waits until all workers serve, for at most `timeout_s` seconds."""
        await _wait_all((connection.serving for connection in self.all), timeout_s=timeout_s)

    def close(self) -> None:
        for connection in self.all:
            if connection.channel is not None:
                connection.channel.close()

    def notify(self, message: messages.Message) -> None:
        """Sends the message to all workers."""
        for connection in self.all:
            connection.notify(message)

    def release(self) -> None:
        """Tells the workers that the router's record is withdrawn, so that no new clients come."""
        self.notify(messages.Release())

    def configure(self, settings: messages.Settings) -> None:
        """Sends the settings to all workers now, and later to each worker that is attached."""
        self.settings = settings
        self.notify(settings)

    def set_tokens(self, tokens: messages.UserTokensChanged) -> None:
        """Sends the users' tokens to all workers now, and later to each worker that is attached."""
        self.tokens = tokens
        self.notify(tokens)

    async def metrics(self) -> list[messages.MetricsDump]:
        """Returns the counts of each worker, including those of earlier processes with the worker's number."""
        await asyncio.gather(*map(self._collect, self.all))
        return [connection.metrics for connection in self.all]

    async def oldest_waits(self) -> dict[tuple[str, str], float]:
        """Returns for how many seconds the oldest waiting request has waited, by expert and name of the class. A worker
        that does not answer in time is left out."""
        oldest: dict[tuple[str, str], float] = {}
        for answer in await asyncio.gather(*map(self._oldest_waits_of, self.all)):
            for expert, classes in answer.items():
                for name, waited_s in classes.items():
                    oldest[expert, name] = max(waited_s, oldest.get((expert, name), 0.0))
        return oldest

    async def find_turn(self, session: str) -> Turn | None:
        """Returns the session's last turn, whichever worker served it; None if it is unknown. Asks each worker for the
        reply to a `Sync` first: since a worker reports a turn before it answers its client, this process then knows
        every turn whose response a client has received."""
        await self.informed.wait()
        await asyncio.gather(*(connection.call(messages.Sync()) for connection in self.all))
        if self.sessions.find(session) is None and self.on_unknown_session is not None:
            await self.on_unknown_session()
        return self.sessions.find(session)

    def publish_soon(self) -> None:
        """Sends the snapshot at the end of the present step of the event loop, once for all changes in the step."""
        if self._publishing is None:
            self._publishing = asyncio.get_running_loop().call_soon(self._publish)

    def publish_changes(self) -> None:
        """Sends the snapshot to the workers now if a replica or a forecast differs from what was sent last."""
        if self._snapshot != self._take_snapshot() or self._forecasts != self.table.forecasts:
            self._publish()

    def _publish(self) -> None:
        self._publishing = None
        snapshot, forecasts = self._take_snapshot(), dict(self.table.forecasts)
        changed = snapshot != self._snapshot or forecasts != self._forecasts
        self._snapshot, self._forecasts = snapshot, forecasts
        self.informed.set()
        for connection in self.all:
            if changed or connection.stale:
                self._send_snapshot(connection)

    def _take_snapshot(self) -> tuple[ReplicaSnapshot, ...]:
        assign_columns(self.table, self.counters, experts=self.experts)
        return snapshot_of(self.table)

    def _send_snapshot(self, connection: WorkerConnection) -> None:
        """Sends the current snapshot to a worker if the worker has applied the previous one. Otherwise does it once the
        worker has applied that, so that the worker skips the snapshots in between."""
        if self._snapshot is None or not connection.greeted.is_set():
            return
        connection.stale = not connection.applied
        if connection.applied:
            connection.applied = False
            columns = dict(self.table.queue_columns)
            connection.notify(messages.Snapshot(connection.observed, self._snapshot, columns, self._forecasts))

    def _receive(self, connection: WorkerConnection, message: messages.Message) -> Awaitable[Any] | None:
        match message:
            case messages.Hello():
                self._greet(connection, message)
            case messages.Serving():
                connection.serving.set()
            case messages.SnapshotApplied():
                connection.applied = True
                if connection.stale:
                    self._send_snapshot(connection)
            case messages.ReplicaObservation():
                self._observe(connection, message)
            case messages.TurnAnswered(session, turn):
                self._learn(connection, session, turn)
            case messages.MetricsReport(metrics):
                self.events.counted(connection.metrics, metrics)
                connection.metrics = metrics
            case messages.TaskFailed(task, error):
                self.events.worker_task_failed(task, error)
            case messages.FindTurn(session):
                return self.find_turn(session)
            case _:
                return self.events.answer(message)
        return None

    def _greet(self, connection: WorkerConnection, hello: messages.Hello) -> None:
        """Handles a worker's `Hello`: sends the worker the settings and the snapshot. If it replaces a worker that has
        ended, it gets that worker's counts and turns to continue with."""
        replaced = connection.pid not in (None, hello.pid)
        connection.pid = hello.pid
        if replaced:
            turns = [(s, turn) for s, turn in self.sessions if self._session_workers.get(s) == connection.worker]
            connection.notify(messages.Inherit(connection.metrics, tuple(turns)))
        else:
            connection.metrics = hello.metrics
        for session, turn in hello.turns:
            self._learn(connection, session, turn)
        connection.notify(self.settings)
        if self.tokens is not None:
            connection.notify(self.tokens)
        if hello.replicas is not None and self._snapshot is None:
            self._seed(hello.replicas)
            self.table.queue_columns = {**hello.queue_columns, **self.table.queue_columns}
        if hello.serving:
            connection.serving.set()
        connection.greeted.set()
        self._send_snapshot(connection)

    def _seed(self, snapshot: Iterable[ReplicaSnapshot]) -> None:
        """Adds the replicas that one worker knows (`snapshot`) to `seeds`. If workers know different states of a
        replica and one of these is ejected, the replica stays ejected."""
        known = ReplicaTable()
        apply_snapshot(known, snapshot)
        for replica in known.all():
            if replica.name not in self.seeds or replica.state is RoutingState.EJECTED:
                self.seeds[replica.name] = replica

    def _learn(self, connection: WorkerConnection, session: str, turn: Turn) -> None:
        self.sessions.learn(session, turn)
        self._session_workers[session] = connection.worker
        if len(self._session_workers) > 2 * self.sessions.most:
            known = self._session_workers
            self._session_workers = {s: known[s] for s, _ in self.sessions if s in known}

    def _observe(self, connection: WorkerConnection, observation: messages.ReplicaObservation) -> None:
        connection.observed, connection.stale = observation.number, True
        self.events.observed(observation)
        if observation.incident is not None or observation.event is not None:
            self.publish_soon()

    async def _collect(self, connection: WorkerConnection) -> None:
        metrics = await connection.call(messages.GetMetrics())
        if metrics is not None:
            connection.metrics = metrics

    async def _oldest_waits_of(self, connection: WorkerConnection) -> dict[str, dict[str, float]]:
        return await connection.call(messages.GetOldestWaits()) or {}

    def _detach(self, connection: WorkerConnection, channel: RpcPeer) -> None:
        if connection.channel is channel:
            connection.channel = None
            connection.serving.clear()
            connection.greeted.clear()


def assign_columns(table: ReplicaTable, counters: Counters, *, experts: Iterable[str] = ()) -> None:
    """Assigns a column of the shared counters to each replica, and to the queue of each expert, that has none yet."""
    used = {replica.column for replica in table.all()} | set(table.queue_columns.values())
    for replica in table.all():
        if replica.column == NO_COLUMN:
            replica.column = counters.allocate(used)
    wanted = table.experts() | set(experts)
    if wanted != table.queue_columns.keys():
        table.queue_columns = {e: table.queue_columns.get(e) or counters.allocate(used) for e in wanted}


async def _wait_all(events: Iterable[asyncio.Event], *, timeout_s: float) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    if waits:
        _, late = await asyncio.wait(waits, timeout=timeout_s)
        for wait in late:
            wait.cancel()
