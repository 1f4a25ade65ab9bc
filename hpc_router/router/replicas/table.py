"""The router's view of every replica: which may be used, and how many requests each has in flight. No I/O.

A request gets a place on a replica, which `balancing` chooses, as a `Reservation`. A place that becomes free goes to
the request that has waited longest for it, in the same step, so later requests cannot overtake and no wake-up is
lost. A request for several experts waits for the first that has a ready replica, and for the next ones once that has
none.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from random import Random
from typing import Final

from hpc_router.errors import HpcRouterError
from hpc_router.relay.in_flight import Cells
from hpc_router.router.ipc.shared_counters import NOWHERE
from hpc_router.router.replicas.admission import MIN_WAIT_S, UNKNOWN_S, DepartureRate, QueueLimits
from hpc_router.router.replicas.balancing import load_bound, pinned, power_of_two_choices, rendezvous
from hpc_router.router.replicas.replica import READY, Event, Replica, Reservation, RoutingState
from hpc_router.state.registry import Record, RecordKind

PEER_REFRESH_S: Final = 0.005
"""A place that another worker gave back is noticed so soon by those who wait for it here."""
DEFAULT_WAITING: Final = 1024


class ReplicaLostError(HpcRouterError):
    """The only replica that would do is ready no more."""


class QueueFullError(HpcRouterError):
    """As many wait for the expert as may. `serves`: it has a ready replica."""

    def __init__(self, expert: str, *, serves: bool) -> None:
        super().__init__(f"as many requests wait for {expert} as router.max_waiting admits")
        self.expert, self.serves = expert, serves


AffinitySlot = Callable[[], int | None]
_has_room: Final[Callable[[Replica], bool]] = attrgetter("has_room")


@dataclass(slots=True, eq=False)
class _Waiter:
    """`experts`: those it waits for by now; `later`: those it turns to when none of these has a ready replica.

    `number`: in the order of arrival.
    """

    number: int
    experts: list[str]
    later: list[str]
    avoid: Collection[Replica]
    only: Replica | None
    granted: asyncio.Future[Reservation]


@dataclass(slots=True)
class ReplicaTable:
    """All replicas by name, and the requests that wait for one, per expert in order of arrival.

    `pin_bound`: times the average load that a replica may have and still be given a conversation that belongs to it;
    None: they belong nowhere. `bounds`: see `admission`. What is in flight and what waits here is counted in `cells`,
    what does in the router's other workers is read from `peers`; `queues`: the columns of what waits, by expert.
    `on_change` is told when there is something new to know of a replica.
    """

    pin_bound: float | None = None
    bounds: QueueLimits = field(default_factory=lambda: QueueLimits(waiting=DEFAULT_WAITING))
    random: Random = field(default_factory=Random)
    clock: Callable[[], float] = time.monotonic
    cells: Cells = field(default_factory=lambda: defaultdict[int, int](int))
    peers: Sequence[Cells] = ()
    queues: Mapping[str, int] = field(default_factory=dict)
    on_change: Callable[[], None] | None = None
    _replicas: dict[str, Replica] = field(default_factory=dict)
    _by_expert: dict[str, list[Replica]] = field(default_factory=dict)
    _orders: dict[str, dict[int, list[Replica]]] = field(default_factory=dict)  # as `rendezvous` has them, by slot
    _waiting: dict[str, dict[_Waiter, None]] = field(default_factory=dict)
    _paces: dict[str, DepartureRate] = field(default_factory=dict)
    _uses: int = 0
    _arrivals: int = 0
    _looking: asyncio.TimerHandle | None = None

    def all(self) -> Collection[Replica]:
        return self._replicas.values()

    def get(self, name: str) -> Replica | None:
        return self._replicas.get(name)

    def put(self, replica: Replica) -> None:
        """Add it, or replace its predecessor of the same name."""
        self.remove(replica.name)
        self._replicas[replica.name] = replica
        self._index()
        self._changed()
        self.offer(replica)

    def renew(self, replica: Replica, record: Record) -> None:
        """What its owner says of it now; its address is the same."""
        before = replica.record
        replica.renew(record)
        if record.serves != before.serves:
            self._index()
            self.offer(replica)
        if replace(record, beat=before.beat) != before:
            self._changed()

    def look(self, replicas: Iterable[Replica]) -> None:
        """What the router's other workers have in flight there now."""
        for replica in replicas:
            column, others = replica.column, 0
            for row in self.peers:
                others += row[column]
            replica.others = others

    def move(self, replica: Replica, column: int) -> None:
        """Count it there."""
        if column != replica.column:
            self.cells[replica.column] = 0
            self.cells[column] = len(replica.holds)
            replica.column = column

    def remove(self, name: str) -> None:
        """Forget it; a request that still holds it is told and releases into nothing."""
        if replica := self._replicas.pop(name, None):
            self._index()
            replica.lose()
            self._disappoint(replica)
            self._changed()

    @property
    def uses(self) -> int:
        """How many places there ever were."""
        return self._uses

    def of(self, expert: str) -> Sequence[Replica]:
        return self._by_expert.get(expert, ())

    def experts(self) -> set[str]:
        return {expert for replica in self._replicas.values() for expert in replica.record.serves}

    def ready(self) -> dict[str, int]:
        """Experts with a ready replica -> requests in flight on all their replicas."""
        if self.peers:
            self.look(self.all())
        load: dict[str, int] = {}
        for replica in self._replicas.values():
            if replica.standing is RoutingState.READY:
                for expert in replica.record.serves:
                    load[expert] = load.get(expert, 0) + replica.load
        return load

    def apply(self, replica: Replica, event: Event) -> bool:
        """True when its standing changed. Once it is ready (again), whoever avoided it may have it."""
        before = replica.standing
        replica.apply(event)
        return self._stands(replica, before, lost=event is Event.FAILED)

    def adopt(self, replica: Replica, standing: RoutingState, *, lost: bool) -> bool:
        """What the process that watches it has decided; else the same as `apply`."""
        before, replica.standing = replica.standing, standing
        return self._stands(replica, before, lost=lost)

    def _stands(self, replica: Replica, before: RoutingState, *, lost: bool) -> bool:
        if replica.standing is before:
            return False
        self._changed()
        if replica.standing is RoutingState.READY:
            self.offer(replica, forgiven=True)
            return True
        self._disappoint(replica)
        if lost:
            replica.lose()
        return True

    def acquire(
        self,
        experts: Sequence[str],
        *,
        avoid: Collection[Replica] = (),
        only: Replica | None = None,
        slot: AffinitySlot | None = None,
    ) -> Reservation | None:
        """A place on the replica that `pick` names."""
        picked = self.pick(experts, avoid=avoid, only=only, slot=slot)
        return None if picked is None else self.hold(*picked)

    def pick(
        self,
        experts: Sequence[str],
        *,
        avoid: Collection[Replica] = (),
        only: Replica | None = None,
        slot: AffinitySlot | None = None,
    ) -> tuple[Replica, str] | None:
        """A replica with room, of the first of these experts that has a ready one. `only`: no other replica than that.
        `slot`: asked for where the conversation belongs, if that matters."""
        for expert in experts:
            replicas = self._by_expert.get(expert, ())
            if self.peers:
                self.look(replicas)
                if self._waiting:  # what another worker has given back is theirs first
                    for replica in replicas:
                        self.offer(replica)
            if self.bounds.in_flight and self._at_bound(expert):
                if self._serves(expert, avoid):
                    return None
                continue
            if len(replicas) == 1:
                replica = replicas[0]
                if replica in avoid or replica is not (only or replica) or replica.standing is not READY:
                    continue
                return (replica, expert) if replica.has_room else None
            if replicas:
                fits = _has_room if only is None and not avoid else partial(_would_do, avoid=avoid, only=only)
                best = self._pinned(expert, replicas, slot(), fits) if slot is not None and self.pin_bound else None
                best = best or power_of_two_choices(replicas, fits=fits, random=self.random)
                if best is not None:
                    return best, expert
                if self._serves(expert, avoid):
                    return None
        return None

    def _pinned(
        self, expert: str, replicas: Sequence[Replica], slot: int | None, fits: Callable[[Replica], bool]
    ) -> Replica | None:
        """The one that a conversation belongs to, or the next one where that has more than its share."""
        if slot is None:
            return None
        orders = self._orders.setdefault(expert, {})
        order = orders.get(slot)
        if order is None:
            order = orders[slot] = [replicas[at] for at in rendezvous([r.place for r in replicas], slot)]
        ready = [replica.load for replica in replicas if replica.standing is READY]
        bound = load_bound(total=sum(ready), replicas=len(ready), factor=self.pin_bound or 0)
        return pinned(order, fits=fits, bound=bound)

    def _at_bound(self, expert: str) -> bool:
        bound = self.bounds.in_flight.get(expert)
        return bound is not None and self.load(expert) >= bound

    def load(self, expert: str) -> int:
        """What is in flight on its replicas."""
        return sum(replica.load for replica in self._by_expert.get(expert, ()))

    def _serves(self, expert: str, avoid: Collection[Replica]) -> bool:
        """Whether it is worth waiting for."""
        return any(r.standing is READY and r not in avoid for r in self._by_expert.get(expert, ()))

    def hold(self, replica: Replica, expert: str) -> Reservation:
        """A place on a replica that has room."""
        self._uses += 1
        replica.last_used = self._uses
        hold = Reservation(replica, expert, self)
        replica.holds.add(hold)
        self.cells[replica.column] = len(replica.holds)
        return hold

    async def wait(
        self, experts: Sequence[str], *, avoid: Collection[Replica] = (), only: Replica | None = None
    ) -> Reservation:
        """The next place that becomes free with the first of these experts that serves, in turn.

        With `only`, on that replica; raises ReplicaLostError as soon as it is not ready. Raises QueueFullError."""
        if only is not None and (only.standing is not RoutingState.READY or self._replicas.get(only.name) is not only):
            raise ReplicaLostError(f"{only.name} is not ready")
        self._arrivals += 1
        waiter = _Waiter(
            self._arrivals, [], list(experts), set(avoid), only, asyncio.get_running_loop().create_future()
        )
        self._widen(waiter)
        full = next((expert for expert in waiter.experts if self.waiting(expert) > self.bounds.waiting), None)
        if full is not None:
            self._forget(waiter)
            raise QueueFullError(full, serves=self._serves(full, waiter.avoid))
        if self.peers and self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(PEER_REFRESH_S, self._look_for_places)
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
        """In the whole router."""
        column = self.queues.get(expert, NOWHERE)
        others = sum(row[column] for row in self.peers) if column != NOWHERE else 0
        return len(self._waiting.get(expert, ())) + others

    def waiting_here(self, expert: str) -> int:
        return len(self._waiting.get(expert, ()))

    def wait_s(self, expert: str) -> float:
        """How long those who wait here now will take, at the pace of late; for one that comes again after that."""
        pace = self._paces.get(expert)
        return UNKNOWN_S if pace is None else pace.wait_s(self.waiting_here(expert), self.clock())

    def longest_wait_s(self) -> float:
        return max(map(self.wait_s, self._waiting), default=MIN_WAIT_S)

    def count_queues(self, queues: Mapping[str, int]) -> None:
        """Count what waits in these columns from now on."""
        for expert, column in self.queues.items():
            if queues.get(expert) != column:
                self.cells[column] = 0
        self.queues = queues
        for expert in queues:
            self._count_waiting(expert)

    def offer(self, replica: Replica, *, forgiven: bool = False) -> None:
        """Give its free places to those who wait for them."""
        if not self._waiting or self._replicas.get(replica.name) is not replica:
            return
        if self.peers:
            self.look((replica,))
        for waiter, expert in self._in_turn(replica):
            if not replica.has_room:
                return
            if self.bounds.in_flight and self._at_bound(expert):
                continue
            if waiter.granted.done() or (replica in waiter.avoid and not forgiven):
                continue
            if waiter.only not in (None, replica):
                continue
            self._forget(waiter)
            self._paces[expert].left(self.clock())
            waiter.granted.set_result(self.hold(replica, expert))

    def _in_turn(self, replica: Replica) -> Sequence[tuple[_Waiter, str]]:
        """Who waits for an expert that it serves, and for which, in the order in which they came."""
        queues = [(expert, self._waiting[expert]) for expert in replica.record.serves if expert in self._waiting]
        waiting = [(waiter, expert) for expert, queue in queues for waiter in queue]
        if len(queues) > 1:
            waiting.sort(key=lambda one: one[0].number)
        return waiting

    def _disappoint(self, replica: Replica) -> None:
        """Those who would take no other need not wait for it; others may have to turn to another expert."""
        for expert in replica.record.serves:
            for waiter in tuple(self._waiting.get(expert, ())):
                if waiter.granted.done():
                    continue
                if waiter.only is replica:
                    self._forget(waiter)
                    waiter.granted.set_exception(ReplicaLostError(f"{replica.name} is not ready any more"))
                elif waiter.later:
                    self._widen(waiter)

    def _widen(self, waiter: _Waiter) -> None:
        """Wait for more experts, until one of them has a replica that would do."""
        before = len(waiter.experts)
        while waiter.later and not any(self._serves(expert, waiter.avoid) for expert in waiter.experts):
            expert = waiter.later.pop(0)
            waiter.experts.append(expert)
            if expert not in self._waiting:
                self._paces.setdefault(expert, DepartureRate()).began(self.clock())
            self._waiting.setdefault(expert, {})[waiter] = None
            self._count_waiting(expert)
        if before:
            for expert in waiter.experts[before:]:
                for replica in self.of(expert):
                    self.offer(replica)

    def _index(self) -> None:
        self._orders.clear()
        self._by_expert = {}
        for replica in self._replicas.values():
            if replica.record.kind is not RecordKind.ROUTER:
                for expert in replica.record.serves:
                    self._by_expert.setdefault(expert, []).append(replica)

    def _forget(self, waiter: _Waiter) -> None:
        for expert in waiter.experts:
            queue = self._waiting.get(expert, {})
            queue.pop(waiter, None)
            if not queue:
                self._waiting.pop(expert, None)
            self._count_waiting(expert)

    def _count_waiting(self, expert: str) -> None:
        self.cells[self.queues.get(expert, NOWHERE)] = self.waiting_here(expert)

    def _look_for_places(self) -> None:
        """Nobody says when another worker gives a place back: look for it as long as somebody waits."""
        self._looking = None
        try:
            for replica in {replica for expert in self._waiting for replica in self.of(expert)}:
                self.offer(replica)
        finally:  # a fault in one look does not end the looking
            if self._waiting:
                self._looking = asyncio.get_running_loop().call_later(PEER_REFRESH_S, self._look_for_places)

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()


def _would_do(replica: Replica, *, avoid: Collection[Replica], only: Replica | None) -> bool:
    return replica.has_room and replica not in avoid and (only is None or replica is only)
