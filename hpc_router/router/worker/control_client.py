"""A worker's connection to the control process.

The worker receives the states of the replicas, the settings, and the counts of the worker that it replaces. It reports
what its requests show about the health of a replica, and acts on this without waiting for an answer. While no control
process runs, it uses the last snapshot. A new control process gets all that the worker knows, so nothing is lost.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from hpc_router.background_tasks import restarting
from hpc_router.router.access.user_access import UserTokens
from hpc_router.router.ipc import messages
from hpc_router.router.ipc.rpc import ChannelClosedError, RpcPeer
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.health import Incident
from hpc_router.router.replicas.replica import Event, Replica, RoutingState
from hpc_router.router.replicas.sessions import Sessions
from hpc_router.router.replicas.snapshot import apply_snapshot, snapshot_of
from hpc_router.router.replicas.table import ReplicaTable

CALL_TIMEOUT_S: Final = 5.0
"""Maximum time in seconds that a client waits for data that only the control process has."""

R = TypeVar("R")


@dataclass(slots=True)
class ControlClient:
    """The worker's end of the connection, and the state that the control process sends to the worker.

    `ejects_at_once`: whether the first failed connection ejects a replica. `informed` is set after the first snapshot,
    `released` once the router's record is withdrawn. `on_settings` is called after new `settings` have arrived,
    `on_certificate` after the router's certificate has changed. `users`: the tokens of users other than the owner.
    """

    table: ReplicaTable
    sessions: Sessions
    metrics: Metrics
    ejects_at_once: bool = True
    users: UserTokens = field(default_factory=UserTokens)
    informed: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    serving: bool = False
    settings: messages.Settings | None = None
    on_settings: Callable[[], None] | None = None
    on_certificate: Callable[[], None] | None = None
    _channel: RpcPeer | None = None
    _attached: asyncio.Event = field(default_factory=asyncio.Event)
    _observations: int = 0
    _unacknowledged: dict[Replica, int] = field(default_factory=dict)
    _reported: messages.MetricsDump | None = None
    _reporting: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.sessions.on_turn = lambda session, turn: self._notify(messages.TurnAnswered(session, turn))

    async def attach(self, sock: socket.socket) -> None:
        """Connects to the control process, or to its successor, over `sock`."""
        if self._channel is not None:
            self._channel.close()
        self._observations = 0
        self._unacknowledged.clear()
        channel = RpcPeer(self._receive, lambda: self._detach(channel))
        self._channel = channel
        await channel.open(sock)
        if self._channel is not channel:  # a newer one was attached meanwhile, or this one has ended
            channel.close()
            return
        self._reported = self.metrics.dump()
        hello = messages.Hello(
            pid=os.getpid(),
            serving=self.serving,
            replicas=snapshot_of(self.table) if self.informed.is_set() else None,
            queue_columns=dict(self.table.queue_columns),
            turns=tuple(self.sessions),
            metrics=self._reported,
        )
        channel.notify(hello)
        self._attached.set()
        if self._reporting is None:
            reporting = restarting("metrics report", self._report_forever, self.task_failed)
            self._reporting = asyncio.create_task(reporting, name="metrics report")

    def close(self) -> None:
        """Sends the last counts and closes the connection."""
        if self._reporting is not None:
            self._reporting.cancel()
        if self._channel is not None:
            self._notify(messages.MetricsReport(self.metrics.dump()))
            self._channel.close()

    def task_failed(self, task: str, error: str) -> None:
        """Counts and reports a failure of the worker's background task named `task`, which is then started again."""
        self.metrics.task_failures.add(task)
        self._notify(messages.TaskFailed(task, error))

    def start_serving(self) -> None:
        """Reports that this worker accepts connections."""
        self.serving = True
        self._notify(messages.Serving())

    async def call(self, call: messages.Call[R]) -> R:
        """Returns the reply of the control process. If the control process ends meanwhile, asks its successor. Raises
        ChannelClosedError after `CALL_TIMEOUT_S`."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                while True:
                    await self._attached.wait()
                    channel = self._channel
                    assert channel is not None
                    try:
                        return await channel.call(call, timeout_s=CALL_TIMEOUT_S)
                    except ChannelClosedError:
                        if self._channel is channel:  # otherwise it has ended, and its successor may answer
                            raise
        except (TimeoutError, ChannelClosedError) as error:
            raise ChannelClosedError(
                f"the router's control process does not answer {type(call).__name__}", retry_after_s=2
            ) from error

    async def recall(self, session: str) -> None:
        """Fetches the session's last turn, whichever worker served it, and stores it in `sessions`."""
        turn = await self.call(messages.FindTurn(session))
        if turn is not None:
            self.sessions.learn(session, turn)

    def connect_failed(self, replica: Replica, trouble: str) -> None:
        replica.trouble = trouble
        if self.ejects_at_once:
            self._apply(replica, Event.FAILED)
        self._observed(replica, incident=Incident.NO_CONNECTION)

    def request_failed(self, replica: Replica, trouble: str) -> None:
        replica.recent_error, replica.trouble = True, trouble
        self._observed(replica, incident=Incident.ERROR)

    def request_succeeded(self, replica: Replica) -> None:
        replica.recent_error = False
        self._observed(replica, incident=Incident.ANSWERED)

    def state_reported(self, replica: Replica, event: Event) -> None:
        self._apply(replica, event)
        self._observed(replica, event=event)

    def recheck(self, replica: Replica) -> None:
        self._observed(replica)

    def _apply(self, replica: Replica, event: Event) -> None:
        if self.table.get(replica.name) is replica:
            self.table.apply(replica, event)

    def _observed(self, replica: Replica, *, incident: Incident | None = None, event: Event | None = None) -> None:
        self._observations += 1
        number, nonce = self._observations, replica.record.nonce
        if incident is not None or event is not None:
            self._unacknowledged[replica] = number
        self._notify(messages.ReplicaObservation(number, replica.name, nonce, incident, event, replica.trouble))

    def _receive(self, message: messages.Message) -> dict[str, Any] | None:
        match message:
            case messages.Snapshot():
                self._apply_snapshot(message)
            case messages.Settings():
                self.settings = message
                if self.on_settings is not None:
                    self.on_settings()
            case messages.UserTokensChanged(tokens):
                self.users.update(tokens)
            case messages.CertificateChanged():
                if self.on_certificate is not None:
                    self.on_certificate()
            case messages.Inherit(metrics, turns):
                self.metrics.absorb(metrics)
                for session, turn in turns:
                    self.sessions.learn(session, turn)
            case messages.GetMetrics():
                return self.metrics.dump()
            case messages.GetOldestWaits():
                return self.table.oldest_waits()
            case messages.ReplicaWell(name):
                replica = self.table.get(name)
                if replica is not None and replica.state is RoutingState.READY:
                    self.table.offer(replica, ignore_avoid=True)
            case messages.Sync():
                pass
            case messages.Release():
                self.released.set()
            case _:
                raise ValueError(f"a worker does not handle {type(message).__name__}")
        return None

    def _apply_snapshot(self, snapshot: messages.Snapshot) -> None:
        self._unacknowledged = {
            replica: number for replica, number in self._unacknowledged.items() if number > snapshot.observed
        }
        self.table.reassign_queue_columns(snapshot.queue_columns)
        apply_snapshot(self.table, snapshot.replicas, keep_state={replica.name for replica in self._unacknowledged})
        self.table.forecasts = snapshot.forecasts
        self._notify(messages.SnapshotApplied())
        self.informed.set()

    def _detach(self, channel: RpcPeer) -> None:
        if self._channel is channel:
            self._channel = None
            self._attached.clear()

    def _notify(self, message: messages.Message) -> None:
        if self._channel is not None:
            self._channel.notify(message)

    async def _report_forever(self) -> None:
        while True:
            present = {replica.name for replica in self.table.all()}
            self.metrics.forget(present=present, now=asyncio.get_running_loop().time())
            self.table.lifetimes.refresh(self.table.all(), now=time.time())
            counted = self.metrics.dump()
            if counted != self._reported:
                self._reported = counted
                self._notify(messages.MetricsReport(counted))
            await asyncio.sleep(messages.REPORT_S)
