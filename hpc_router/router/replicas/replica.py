"""One replica as the router sees it: its routing state, and the requests that hold a reservation on it. No I/O.

The state changes only by `TRANSITIONS`; an event that is not in that table is an error. Releasing a `Reservation` twice
has no effect, so the counters return to zero whatever happens to a request. Nothing here chooses a replica.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import TracebackType
from typing import Final, Protocol, Self

from hpc_router.relay.headers import lines
from hpc_router.relay.in_flight import Cells
from hpc_router.relay.upstream.interface import Address, address_of
from hpc_router.relay.upstream.timeouts import IdleTimer
from hpc_router.router.replicas.health import ReplicaHealth
from hpc_router.state.registry import Record

LOST_S: Final = 5.0
"""Idle timeout of requests on a lost replica: one that was ejected, or whose record was withdrawn."""
DEFAULT_CAPACITY: Final = 1024
"""Capacity of an endpoint whose record does not state one."""
NO_COLUMN: Final = 0
"""Column of `Cells` used before the control process has assigned one. It is written and never read."""


class RoutingState(StrEnum):
    """Whether the router sends requests to a replica: the state it reported last, or `ejected` (docs/states.md)."""

    STARTING = "starting"  # it reports that it is not ready yet, or was not probed yet
    READY = "ready"  # gets requests
    DRAINING = "draining"  # finishes its requests, gets no new ones
    EJECTED = "ejected"  # does not answer, fails the challenge, or answers with errors: gets no requests


class Event(StrEnum):
    """What changes a routing state: the state that the replica itself reports, or a failure that the router saw."""

    SAYS_STARTING = "says_starting"
    SAYS_READY = "says_ready"
    SAYS_DRAINING = "says_draining"
    FAILED = "failed"  # a probe or a connection attempt failed
    EXCLUDED = "excluded"  # its responses were errors, several in a row


READY: Final = RoutingState.READY  # an attribute look-up in the enum costs more than the rest of `has_room`
_S, _E = RoutingState, Event
TRANSITIONS: Final[Mapping[tuple[RoutingState, Event], RoutingState]] = {
    (_S.STARTING, _E.SAYS_STARTING): _S.STARTING,
    (_S.STARTING, _E.SAYS_READY): _S.READY,
    (_S.STARTING, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.STARTING, _E.FAILED): _S.EJECTED,
    (_S.READY, _E.SAYS_STARTING): _S.STARTING,  # its engine is being restarted
    (_S.READY, _E.SAYS_READY): _S.READY,
    (_S.READY, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.READY, _E.FAILED): _S.EJECTED,
    (_S.DRAINING, _E.SAYS_STARTING): _S.DRAINING,  # a drain is not taken back
    (_S.DRAINING, _E.SAYS_READY): _S.DRAINING,
    (_S.DRAINING, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.DRAINING, _E.FAILED): _S.EJECTED,
    (_S.EJECTED, _E.SAYS_STARTING): _S.STARTING,
    (_S.EJECTED, _E.SAYS_READY): _S.READY,
    (_S.EJECTED, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.EJECTED, _E.FAILED): _S.EJECTED,
    (_S.STARTING, _E.EXCLUDED): _S.STARTING,  # already out of use: the replica reported it first
    (_S.READY, _E.EXCLUDED): _S.EJECTED,
    (_S.DRAINING, _E.EXCLUDED): _S.DRAINING,
    (_S.EJECTED, _E.EXCLUDED): _S.EJECTED,
}


@dataclass(slots=True, eq=False)
class Replica:
    """One endpoint. `key`: the bearer token of requests to it; `models`: the model names its engine reported;
    `listed_max_model_len`: of its models, as an external endpoint lists it.

    `peer_in_flight`: requests in flight on it from the router's other workers. Balancing and limits use `load`, the sum
    over all workers.
    """

    record: Record
    key: str | None
    state: RoutingState = RoutingState.STARTING
    models: tuple[str, ...] = ()
    listed_max_model_len: int | None = None
    last_used: int = 0
    health: ReplicaHealth = field(default_factory=ReplicaHealth)
    recent_error: bool = False  # its last request failed: the next success must be reported
    trouble: str | None = None  # text of the last failure
    reservations: "set[Reservation]" = field(default_factory=set)
    peer_in_flight: int = 0
    column: int = NO_COLUMN  # of the shared counters: its requests in flight
    request_starts: dict[str, bytes] = field(default_factory=dict)  # API path -> request line, host, authorization
    routing_lines: dict[tuple[str, str], bytes] = field(default_factory=dict)  # expert, reason -> response headers
    address: Address = field(init=False)
    capacity: int = field(init=False)

    def __post_init__(self) -> None:
        self.renew(self.record)
        self.address = address_of(self.record.url)

    def renew(self, record: Record) -> None:
        self.record = record
        self.capacity = record.capacity or DEFAULT_CAPACITY

    def is_at(self, record: Record) -> bool:
        """Whether the record describes the same server process."""
        own = self.record
        return (own.url, own.nonce, own.generation, own.kind) == (
            record.url, record.nonce, record.generation, record.kind,
        )  # fmt: skip

    @property
    def authorization(self) -> bytes:
        """The `authorization` header line of requests to it; empty without a key."""
        return _authorization(self.key)

    @property
    def in_flight(self) -> int:
        """Requests of this worker."""
        return len(self.reservations)

    @property
    def load(self) -> int:
        """Requests of all workers."""
        return len(self.reservations) + self.peer_in_flight

    @property
    def has_room(self) -> bool:
        return self.state is READY and len(self.reservations) + self.peer_in_flight < self.capacity

    @property
    def name(self) -> str:
        return self.record.replica

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and response together; None: not known."""
        return self.record.engine.max_model_len or self.listed_max_model_len

    @property
    def slot_name(self) -> str:
        """The name without the generation, so that a replica's successor inherits its conversations."""
        return self.record.replica.rpartition(".")[0]

    def model_for(self, expert: str) -> str | None:
        """The engine's model name of this expert; an endpoint with a single model needs no name in its record."""
        name = self.record.serves.get(expert)
        return name if name is not None or len(self.models) != 1 else self.models[0]

    def apply(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]

    def mark_lost(self) -> None:
        """Shorten the idle timeout of every request on it to `LOST_S`."""
        for reservation in tuple(self.reservations):
            reservation.mark_lost()

    def __repr__(self) -> str:
        return f"<Replica {self.name} {self.state} {self.load}/{self.capacity}>"


class ReservationOwner(Protocol):
    """What a released reservation is returned to."""

    cells: Cells

    def offer(self, replica: Replica) -> None: ...


@dataclass(slots=True, eq=False)
class Reservation:
    """One request's place on a replica, acquired for `expert`. On a lost replica its idle timeout is `LOST_S`."""

    replica: Replica
    expert: str
    _owner: ReservationOwner
    idle_timer: IdleTimer | None = None
    lost: bool = False

    def watch(self, idle_timer: IdleTimer) -> None:
        """Control this timer: shorten it now or as soon as the replica is lost."""
        self.idle_timer = idle_timer
        if self.lost:
            idle_timer.tighten(LOST_S)

    def mark_lost(self) -> None:
        self.lost = True
        if self.idle_timer is not None:
            self.idle_timer.tighten(LOST_S)

    def release(self) -> None:
        replica, owner = self.replica, self._owner
        reservations = replica.reservations
        if self in reservations:
            reservations.remove(self)
            owner.cells[replica.column] = len(reservations)
            owner.offer(replica)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@lru_cache(maxsize=1024)
def _authorization(key: str | None) -> bytes:
    return b"" if key is None else lines({"authorization": f"Bearer {key}"})
