"""The router's view of every replica: which may be used, and how many requests each has in flight. No I/O.

A replica's standing is a state and changes only by the table below; an event not in it is an error. `acquire` hands
out the replica with the fewest requests in flight as a `Hold`, whose release is idempotent, so that counters return to
zero whatever happens to a request.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Final, Self

from hpc_router.registry import Kind, Record

DEFAULT_CAPACITY: Final = 1024
"""For endpoints that do not say how many requests they take at once."""


class Standing(StrEnum):
    STARTING = "starting"  # its engine does not answer yet, or nobody has asked
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    EJECTED = "ejected"  # does not answer, or not as itself


class Event(StrEnum):
    SAYS_STARTING = "says_starting"
    SAYS_READY = "says_ready"
    SAYS_DRAINING = "says_draining"
    FAILED = "failed"  # a probe or a connection attempt


_S, _E = Standing, Event
TRANSITIONS: Final[Mapping[tuple[Standing, Event], Standing]] = {
    (_S.STARTING, _E.SAYS_STARTING): _S.STARTING,
    (_S.STARTING, _E.SAYS_READY): _S.READY,
    (_S.STARTING, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.STARTING, _E.FAILED): _S.EJECTED,
    (_S.READY, _E.SAYS_STARTING): _S.STARTING,  # its engine is being restarted
    (_S.READY, _E.SAYS_READY): _S.READY,
    (_S.READY, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.READY, _E.FAILED): _S.EJECTED,
    (_S.DRAINING, _E.SAYS_STARTING): _S.DRAINING,  # there is no way back from draining
    (_S.DRAINING, _E.SAYS_READY): _S.DRAINING,
    (_S.DRAINING, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.DRAINING, _E.FAILED): _S.EJECTED,
    (_S.EJECTED, _E.SAYS_STARTING): _S.STARTING,
    (_S.EJECTED, _E.SAYS_READY): _S.READY,
    (_S.EJECTED, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.EJECTED, _E.FAILED): _S.EJECTED,
}


@dataclass(slots=True, eq=False)
class Replica:
    """One endpoint. `key`: the token it is called with; `models`: the names its engine said it answers to."""

    record: Record
    key: str | None
    standing: Standing = Standing.STARTING
    models: tuple[str, ...] = ()
    in_flight: int = 0
    last_used: int = 0
    failures: int = 0  # in a row
    trouble: str | None = None  # what the last failure was

    @property
    def name(self) -> str:
        return self.record.replica

    @property
    def capacity(self) -> int:
        return self.record.capacity or DEFAULT_CAPACITY

    def model_for(self, expert: str) -> str | None:
        """The name its engine knows this expert by; an external endpoint with one model needs none in its record."""
        named = self.record.serves.get(expert)
        return named if named is not None or len(self.models) != 1 else self.models[0]

    def apply(self, event: Event) -> None:
        self.standing = TRANSITIONS[self.standing, event]

    def __repr__(self) -> str:
        return f"<Replica {self.name} {self.standing} {self.in_flight}/{self.capacity}>"


@dataclass(slots=True, eq=False)
class Hold:
    """One request's place on a replica."""

    replica: Replica
    _table: "ReplicaTable"
    _released: bool = False

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._table.put_back(self.replica)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@dataclass(slots=True)
class ReplicaTable:
    """All replicas by name, and the requests that wait for one."""

    _replicas: dict[str, Replica] = field(default_factory=dict)
    _waiting: dict[str, deque[asyncio.Future[None]]] = field(default_factory=dict)
    _uses: int = 0

    def all(self) -> Collection[Replica]:
        return self._replicas.values()

    def get(self, name: str) -> Replica | None:
        return self._replicas.get(name)

    def put(self, replica: Replica) -> None:
        """Add it, or replace its predecessor of the same name."""
        self._replicas[replica.name] = replica

    def remove(self, name: str) -> None:
        """Forget it; a request that still holds it goes on and releases into nothing."""
        self._replicas.pop(name, None)

    def of(self, expert: str) -> list[Replica]:
        return [r for r in self._replicas.values() if expert in r.record.serves and r.record.kind is not Kind.ROUTER]

    def experts(self) -> set[str]:
        return {expert for replica in self._replicas.values() for expert in replica.record.serves}

    def ready(self) -> dict[str, int]:
        """Experts with a ready replica -> requests in flight on all their replicas."""
        load: dict[str, int] = {}
        for replica in self._replicas.values():
            if replica.standing is Standing.READY:
                for expert in replica.record.serves:
                    load[expert] = load.get(expert, 0) + replica.in_flight
        return load

    def apply(self, replica: Replica, event: Event) -> bool:
        """True when its standing changed. Wakes everybody who waits for it once it is ready."""
        before = replica.standing
        replica.apply(event)
        if replica.standing is not before and replica.standing is Standing.READY:
            for expert in replica.record.serves:
                self._wake(expert, everybody=True)
        return replica.standing is not before

    def acquire(self, expert: str, *, avoid: Collection[Replica] = ()) -> Hold | None:
        """The ready replica with the fewest requests in flight (ties: the one not used for longest) with room."""
        able = [
            r for r in self.of(expert) if r.standing is Standing.READY and r.in_flight < r.capacity and r not in avoid
        ]
        if not able:
            return None
        replica = min(able, key=lambda r: (r.in_flight, r.last_used))
        self._uses += 1
        replica.last_used = self._uses
        replica.in_flight += 1
        return Hold(replica, self)

    def put_back(self, replica: Replica) -> None:
        replica.in_flight -= 1
        assert replica.in_flight >= 0, replica
        for expert in replica.record.serves:
            self._wake(expert)

    async def wait(self, experts: Iterable[str]) -> None:
        """Until a replica of one of these experts may have room; spurious wake-ups happen, so ask `acquire` again."""
        names = tuple(experts)
        future = asyncio.get_running_loop().create_future()
        for expert in names:
            self._waiting.setdefault(expert, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # the wake-up was ours to use: hand it on
                for expert in names:
                    self._wake(expert)
            raise
        finally:
            for expert in names:
                queue = self._waiting[expert]
                if future in queue:
                    queue.remove(future)
                if not queue:
                    del self._waiting[expert]

    def waiting(self, expert: str) -> int:
        return len(self._waiting.get(expert, ()))

    def _wake(self, expert: str, *, everybody: bool = False) -> None:
        for future in tuple(self._waiting.get(expert, ())):
            if not future.done():
                future.set_result(None)
                if not everybody:
                    return
