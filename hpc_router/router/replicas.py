"""The router's view of every replica: which may be used, and how many requests each has in flight. No I/O.

A replica's standing is a state and changes only by the table below; an event not in it is an error. A request gets the
replica with the fewest requests in flight as a `Hold`, whose release is idempotent, so that counters return to zero
whatever happens to a request. A place that becomes free goes to the request that has waited longest for it, in the
same step: newcomers cannot overtake, and no wake-up is lost.
"""

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import TracebackType
from typing import Final, Self

from hpc_router.errors import HpcRouterError
from hpc_router.registry import Kind, Record
from hpc_router.relay.exchange import Address, address_of
from hpc_router.relay.headers import lines
from hpc_router.relay.patience import Patience

LOST_S: Final = 5.0
"""A replica that has been ejected or has left may be silent for this long before its requests are given up."""
_FULL: Final = (math.inf, 0)
DEFAULT_CAPACITY: Final = 1024
"""For endpoints that do not say how many requests they take at once."""


class ReplicaLostError(HpcRouterError):
    """The only replica that would do is ready no more."""


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


_READY: Final = Standing.READY  # to look it up in the class costs more than all the rest of `has_room`
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
    last_used: int = 0
    failures: int = 0  # in a row
    trouble: str | None = None  # what the last failure was
    holds: "set[Hold]" = field(default_factory=set)
    address: Address = field(init=False)
    capacity: int = field(init=False)

    def __post_init__(self) -> None:
        self.renew(self.record)
        self.address = address_of(self.record.url)

    def renew(self, record: Record) -> None:
        self.record = record
        self.capacity = record.capacity or DEFAULT_CAPACITY

    @property
    def authorization(self) -> bytes:
        """The header line that it wants."""
        return _authorization(self.key)

    @property
    def in_flight(self) -> int:
        return len(self.holds)

    @property
    def has_room(self) -> bool:
        return self.standing is _READY and len(self.holds) < self.capacity

    @property
    def name(self) -> str:
        return self.record.replica

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
    """One request's place on a replica, got for `expert`. With a replica that is lost there is little patience."""

    replica: Replica
    expert: str
    _table: "ReplicaTable"
    patience: Patience | None = None
    lost: bool = False

    def watch(self, patience: Patience) -> None:
        self.patience = patience
        if self.lost:
            patience.shorten(LOST_S)

    def lose(self) -> None:
        """Its replica is lost."""
        self.lost = True
        if self.patience is not None:
            self.patience.shorten(LOST_S)

    def release(self) -> None:
        if self in self.replica.holds:
            self.replica.holds.remove(self)
            self._table.offer(self.replica)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@dataclass(slots=True, eq=False)
class _Waiter:
    experts: Sequence[str]
    avoid: Collection[Replica]
    only: Replica | None
    granted: asyncio.Future[Hold]


@dataclass(slots=True)
class ReplicaTable:
    """All replicas by name, and the requests that wait for one, per expert in order of arrival."""

    _replicas: dict[str, Replica] = field(default_factory=dict)
    _by_expert: dict[str, list[Replica]] = field(default_factory=dict)
    _waiting: dict[str, dict[_Waiter, None]] = field(default_factory=dict)
    _uses: int = 0

    def all(self) -> Collection[Replica]:
        return self._replicas.values()

    def get(self, name: str) -> Replica | None:
        return self._replicas.get(name)

    def put(self, replica: Replica) -> None:
        """Add it, or replace its predecessor of the same name."""
        self.remove(replica.name)
        self._replicas[replica.name] = replica
        self._index()
        self.offer(replica)

    def renew(self, replica: Replica, record: Record) -> None:
        """What its owner says of it now; its address is the same."""
        before = replica.record
        replica.renew(record)
        if record.serves != before.serves:
            self._index()
            self.offer(replica)

    def remove(self, name: str) -> None:
        """Forget it; a request that still holds it is told and releases into nothing."""
        if replica := self._replicas.pop(name, None):
            self._index()
            _tell_lost(replica)
            self._disappoint(replica)

    def of(self, expert: str) -> Collection[Replica]:
        return self._by_expert.get(expert, ())

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
        """True when its standing changed. Once it is ready (again), whoever avoided it may have it."""
        before = replica.standing
        replica.apply(event)
        if replica.standing is before:
            return False
        if replica.standing is Standing.READY:
            self.offer(replica, forgiven=True)
            return True
        self._disappoint(replica)
        if replica.standing is Standing.EJECTED:
            _tell_lost(replica)
        return True

    def acquire(
        self, experts: Sequence[str], *, avoid: Collection[Replica] = (), only: Replica | None = None
    ) -> Hold | None:
        """A place on the replica that `pick` names."""
        picked = self.pick(experts, avoid=avoid, only=only)
        return None if picked is None else self.hold(*picked)

    def pick(
        self, experts: Sequence[str], *, avoid: Collection[Replica] = (), only: Replica | None = None
    ) -> tuple[Replica, str] | None:
        """With the first of these experts that has room, its replica with the fewest requests in flight (ties: the one
        not used for longest). `only`: no other replica than that."""
        for expert in experts:
            best, least = None, _FULL
            for replica in self.of(expert):
                if replica.has_room and replica not in avoid and (only is None or replica is only):
                    load = (len(replica.holds), replica.last_used)
                    if load < least:
                        best, least = replica, load
            if best is not None:
                return best, expert
        return None

    def hold(self, replica: Replica, expert: str) -> Hold:
        """A place on a replica that has room."""
        self._uses += 1
        replica.last_used = self._uses
        hold = Hold(replica, expert, self)
        replica.holds.add(hold)
        return hold

    async def wait(
        self, experts: Sequence[str], *, avoid: Collection[Replica] = (), only: Replica | None = None
    ) -> Hold:
        """The next place that becomes free with one of these experts, in turn.

        With `only`, on that replica; raises ReplicaLostError as soon as it is not ready."""
        if only is not None and (only.standing is not Standing.READY or self._replicas.get(only.name) is not only):
            raise ReplicaLostError(f"{only.name} is not ready")
        waiter = _Waiter(experts, set(avoid), only, asyncio.get_running_loop().create_future())
        for expert in experts:
            self._waiting.setdefault(expert, {})[waiter] = None
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            granted = waiter.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                granted.result().release()  # granted in the moment of leaving: to the next one
            raise
        finally:
            self._forget(waiter)

    def waiting(self, expert: str) -> int:
        return len(self._waiting.get(expert, ()))

    def offer(self, replica: Replica, *, forgiven: bool = False) -> None:
        """Give its free places to those who wait for them."""
        if not self._waiting or self._replicas.get(replica.name) is not replica:
            return
        for expert in replica.record.serves:
            for waiter in tuple(self._waiting.get(expert, ())):
                if not replica.has_room:
                    return
                if waiter.granted.done() or (replica in waiter.avoid and not forgiven):
                    continue
                if waiter.only not in (None, replica):
                    continue
                self._forget(waiter)
                waiter.granted.set_result(self.hold(replica, expert))

    def _disappoint(self, replica: Replica) -> None:
        """Those who would take no other need not wait for it."""
        for expert in replica.record.serves:
            for waiter in tuple(self._waiting.get(expert, ())):
                if waiter.only is replica and not waiter.granted.done():
                    self._forget(waiter)
                    waiter.granted.set_exception(ReplicaLostError(f"{replica.name} is not ready any more"))

    def _index(self) -> None:
        self._by_expert = {}
        for replica in self._replicas.values():
            if replica.record.kind is not Kind.ROUTER:
                for expert in replica.record.serves:
                    self._by_expert.setdefault(expert, []).append(replica)

    def _forget(self, waiter: _Waiter) -> None:
        for expert in waiter.experts:
            queue = self._waiting.get(expert, {})
            queue.pop(waiter, None)
            if not queue:
                self._waiting.pop(expert, None)


def _tell_lost(replica: Replica) -> None:
    for hold in tuple(replica.holds):
        hold.lose()


@lru_cache(maxsize=1024)
def _authorization(key: str | None) -> bytes:
    return b"" if key is None else lines({"authorization": f"Bearer {key}"})
