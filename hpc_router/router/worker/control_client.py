"""A worker's side of what it shares with the control process.

The replicas' view comes from there, and what the worker sees of a replica itself goes there; it acts on that at once.
While no control process is there the last view stands: the next one is told what this worker knows, so that nothing
is lost with its predecessor.
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

PATIENCE_S: Final = 5.0
"""A client waits so long for what only the control process knows."""
REPORT_S: Final = 1.0


@dataclass(slots=True)
class ControlClient:
    """`ejects_at_once`: a connection that could not be made is enough. `informed` is set once there is a view,
    `released` once nobody is sent here any more."""

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
    _said: int = 0
    _unheard: dict[Replica, int] = field(default_factory=dict)
    _reported: Any = None
    _reporting: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.sessions.on_turn = lambda session, turn: self._tell("turn", [session, turn.to_json()])

    async def attach(self, sock: socket.socket) -> None:
        """To the control process, or to its successor."""
        if self._channel is not None:
            self._channel.close()
        self._said = 0
        self._unheard.clear()
        channel = RpcPeer(self._take, lambda: self._detach(channel))
        self._channel = channel
        await channel.open(sock)
        if self._channel is not channel:  # there is a newer one by now, or it has ended
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
            self._tell("metrics", self.metrics.dump())
            self._channel.close()

    def task_failed(self, task: str, error: str) -> None:
        """A background task of this worker failed and starts again."""
        self.metrics.task_failures.add(task)
        self._tell("task failed", [task, error])

    def begin_to_serve(self) -> None:
        self.serving = True
        self._tell("serving")

    async def ask(self, kind: str, value: Any = None) -> Any:
        """What only the control process knows; its successor is waited for. Raises ChannelClosedError."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    await self._attached.wait()
                    channel = self._channel
                    assert channel is not None
                    try:
                        return await channel.ask(kind, value, limit_s=PATIENCE_S)
                    except ChannelClosedError:
                        if self._channel is channel:  # else it has ended: its successor may know
                            raise
        except (TimeoutError, ChannelClosedError) as error:
            raise ChannelClosedError(
                f"the router's control process does not answer: {kind}", retry_after_s=2
            ) from error

    async def recall(self, session: str) -> None:
        """Learn where the session's last turn was answered, whichever worker served it."""
        turn = await self.ask("recall", session)
        if turn is not None:
            self.sessions.learn(session, Turn.from_json(turn))

    def doubt(self, replica: Replica, trouble: str) -> None:
        replica.trouble = trouble
        if self.ejects_at_once:
            self._apply(replica, Event.FAILED)
        self._report(replica, Incident.NO_CONNECTION)

    def erred(self, replica: Replica, trouble: str) -> None:
        replica.suspect, replica.trouble = True, trouble
        self._report(replica, Incident.ERROR)

    def answered(self, replica: Replica) -> None:
        replica.suspect = False
        self._report(replica, Incident.ANSWERED)

    def heard(self, replica: Replica, event: Event) -> None:
        self._apply(replica, event)
        self._report(replica, event)

    def look_again(self, replica: Replica) -> None:
        self._report(replica, None)

    def _apply(self, replica: Replica, event: Event) -> None:
        if self.table.get(replica.name) is replica:
            self.table.apply(replica, event)

    def _report(self, replica: Replica, seen: Event | Incident | None) -> None:
        self._said += 1
        if seen is not None:
            self._unheard[replica] = self._said
        told = [self._said, replica.name, replica.record.nonce, seen and seen.value, replica.trouble]
        self._tell("saw", told)

    def _take(self, kind: str, value: Any) -> Awaitable[Any] | Any:
        match kind:
            case "view":
                self._view(value)
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

    def _view(self, value: Any) -> None:
        self._unheard = {replica: said for replica, said in self._unheard.items() if said > value["heard"]}
        self.table.count_queues(value["queues"])
        take_over(self.table, value["replicas"], known_better={replica.name for replica in self._unheard})
        self._tell("taken", value["number"])
        self.informed.set()

    def _detach(self, channel: RpcPeer) -> None:
        if self._channel is channel:
            self._channel = None
            self._attached.clear()

    def _tell(self, kind: str, value: Any = None) -> None:
        if self._channel is not None:
            self._channel.tell(kind, value)

    async def _report_forever(self) -> None:
        while True:
            present = {replica.name for replica in self.table.all()}
            self.metrics.forget(present=present, now=asyncio.get_running_loop().time())
            counted = self.metrics.dump()
            if counted != self._reported:
                self._reported = counted
                self._tell("metrics", counted)
            await asyncio.sleep(REPORT_S)
