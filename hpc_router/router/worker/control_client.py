"""A worker's connection to the control process.

The control process sends snapshots of the replica table; the worker sends what its requests observe of replicas and
also applies that at once. Without a control process the last snapshot stays in use, and the next control process gets
the worker's state, so that nothing is lost with the previous one.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from hpc_router.background_tasks import restarting
from hpc_router.router.ipc.rpc import ChannelClosedError, RpcPeer
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.health import Incident
from hpc_router.router.replicas.replica import Event, Replica, RoutingState
from hpc_router.router.replicas.sessions import Sessions, Turn
from hpc_router.router.replicas.snapshot import take_over, view_of
from hpc_router.router.replicas.table import ReplicaTable

CALL_TIMEOUT_S: Final = 5.0
"""Time limit of a call to the control process."""
REPORT_S: Final = 1.0


@dataclass(slots=True)
class ControlClient:
    """`ejects_at_once`: one failed connection attempt ejects a replica. `informed`: set after the first snapshot.
    `released`: set when clients are no longer sent to this worker."""

    table: ReplicaTable
    sessions: Sessions
    metrics: Metrics
    ejects_at_once: bool = True
    informed: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    serving: bool = False
    settings: Mapping[str, Any] | None = None
    on_settings: Callable[[], None] | None = None
    _channel: RpcPeer | None = None
    _attached: asyncio.Event = field(default_factory=asyncio.Event)
    _report_number: int = 0
    _unacknowledged: dict[Replica, int] = field(default_factory=dict)
    _reported: Any = None
    _reporting: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.sessions.on_turn = lambda session, turn: self._notify("turn", [session, turn.to_json()])

    async def attach(self, sock: socket.socket) -> None:
        """Use `sock` as the connection to the control process, in place of an earlier one."""
        if self._channel is not None:
            self._channel.close()
        self._report_number = 0
        self._unacknowledged.clear()
        channel = RpcPeer(self._receive, lambda: self._detach(channel))
        self._channel = channel
        await channel.open(sock)
        if self._channel is not channel:  # replaced or closed meanwhile
            channel.close()
            return
        self._reported = self.metrics.dump()
        hello = {
            "pid": os.getpid(),
            "serving": self.serving,
            "view": view_of(self.table) if self.informed.is_set() else None,
            "queues": dict(self.table.queues),
            "turns": [[session, turn.to_json()] for session, turn in self.sessions],
            "metrics": self._reported,
        }
        channel.tell("hello", hello)
        self._attached.set()
        if self._reporting is None:
            reporting = restarting("metrics report", self._report_forever, self.task_failed)
            self._reporting = asyncio.create_task(reporting, name="metrics report")

    def close(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
        if self._channel is not None:
            self._notify("metrics", self.metrics.dump())
            self._channel.close()

    def task_failed(self, task: str, error: str) -> None:
        """A background task of this worker failed and is restarted."""
        self.metrics.task_failures.add(task)
        self._notify("task failed", [task, error])

    def start_serving(self) -> None:
        self.serving = True
        self._notify("serving")

    async def call(self, kind: str, value: Any = None) -> Any:
        """Call the control process; waits for a new one if it is being replaced. Raises ChannelClosedError."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                while True:
                    await self._attached.wait()
                    channel = self._channel
                    assert channel is not None
                    try:
                        return await channel.ask(kind, value, limit_s=CALL_TIMEOUT_S)
                    except ChannelClosedError:
                        if self._channel is channel:  # otherwise it was replaced: call the new one
                            raise
        except (TimeoutError, ChannelClosedError) as error:
            raise ChannelClosedError(
                f"the router's control process does not answer: {kind}", retry_after_s=2
            ) from error

    async def recall(self, session: str) -> None:
        """Fetch the replica of the session's last turn, which another worker may have served."""
        turn = await self.call("recall", session)
        if turn is not None:
            self.sessions.learn(session, Turn.from_json(turn))

    def connect_failed(self, replica: Replica, trouble: str) -> None:
        replica.trouble = trouble
        if self.ejects_at_once:
            self._apply(replica, Event.FAILED)
        self._report(replica, Incident.NO_CONNECTION)

    def request_failed(self, replica: Replica, trouble: str) -> None:
        replica.suspect, replica.trouble = True, trouble
        self._report(replica, Incident.ERROR)

    def request_succeeded(self, replica: Replica) -> None:
        replica.suspect = False
        self._report(replica, Incident.ANSWERED)

    def state_reported(self, replica: Replica, event: Event) -> None:
        self._apply(replica, event)
        self._report(replica, event)

    def recheck(self, replica: Replica) -> None:
        self._report(replica, None)

    def _apply(self, replica: Replica, event: Event) -> None:
        if self.table.get(replica.name) is replica:
            self.table.apply(replica, event)

    def _report(self, replica: Replica, seen: Event | Incident | None) -> None:
        self._report_number += 1
        if seen is not None:
            self._unacknowledged[replica] = self._report_number
        report = [self._report_number, replica.name, replica.record.nonce, seen and seen.value, replica.trouble]
        self._notify("saw", report)

    def _receive(self, kind: str, value: Any) -> Awaitable[Any] | Any:
        match kind:
            case "view":
                self._apply_snapshot(value)
            case "settings":
                self.settings = value
                if self.on_settings is not None:
                    self.on_settings()
            case "inherit":
                self.metrics.absorb(value["metrics"])
                for session, turn in value["turns"]:
                    self.sessions.learn(session, Turn.from_json(turn))
            case "metrics":
                return self.metrics.dump()
            case "well":
                replica = self.table.get(value)
                if replica is not None and replica.standing is RoutingState.READY:
                    self.table.offer(replica, forgiven=True)
            case "sync":
                return None
            case "release":
                self.released.set()
            case _:
                raise ValueError(f"a worker knows no {kind!r}")
        return None

    def _apply_snapshot(self, value: Any) -> None:
        self._unacknowledged = {
            replica: number for replica, number in self._unacknowledged.items() if number > value["heard"]
        }
        self.table.count_queues(value["queues"])
        take_over(self.table, value["replicas"], known_better={replica.name for replica in self._unacknowledged})
        self._notify("taken", value["number"])
        self.informed.set()

    def _detach(self, channel: RpcPeer) -> None:
        if self._channel is channel:
            self._channel = None
            self._attached.clear()

    def _notify(self, kind: str, value: Any = None) -> None:
        if self._channel is not None:
            self._channel.tell(kind, value)

    async def _report_forever(self) -> None:
        while True:
            present = {replica.name for replica in self.table.all()}
            self.metrics.forget(present=present, now=asyncio.get_running_loop().time())
            counted = self.metrics.dump()
            if counted != self._reported:
                self._reported = counted
                self._notify("metrics", counted)
            await asyncio.sleep(REPORT_S)
