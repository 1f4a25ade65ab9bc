"""One replica as the router sees it: its standing, and the requests that have a place on it. No I/O.

The standing is a state and changes only by the table below; an event that is not in it is an error. A place is a
`Reservation`; its release is idempotent, so that counters return to zero whatever happens to a request.
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
from hpc_router.router.ipc.shared_counters import NOWHERE
from hpc_router.router.replicas.health import ReplicaHealth
from hpc_router.state.registry import Record

LOST_S: Final = 5.0
"""A replica that has been ejected or has left may be silent for this long before its requests are given up."""
DEFAULT_CAPACITY: Final = 1024
"""For endpoints that do not say how many requests they take at once."""


class RoutingState(StrEnum):
    STARTING = "starting"  # its engine does not answer yet, or nobody has asked
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    EJECTED = "ejected"  # does not answer, or not as itself, or with one error after the other


class Event(StrEnum):
    SAYS_STARTING = "says_starting"
    SAYS_READY = "says_ready"
    SAYS_DRAINING = "says_draining"
    FAILED = "failed"  # a probe or a connection attempt
    EXCLUDED = "excluded"  # it answers with errors


READY: Final = RoutingState.READY  # to look it up in the class costs more than all the rest of `has_room`
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
    (_S.DRAINING, _E.SAYS_STARTING): _S.DRAINING,  # there is no way back from draining
    (_S.DRAINING, _E.SAYS_READY): _S.DRAINING,
    (_S.DRAINING, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.DRAINING, _E.FAILED): _S.EJECTED,
    (_S.EJECTED, _E.SAYS_STARTING): _S.STARTING,
    (_S.EJECTED, _E.SAYS_READY): _S.READY,
    (_S.EJECTED, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.EJECTED, _E.FAILED): _S.EJECTED,
    (_S.STARTING, _E.EXCLUDED): _S.STARTING,  # it has said itself by now that something is wrong
    (_S.READY, _E.EXCLUDED): _S.EJECTED,
    (_S.DRAINING, _E.EXCLUDED): _S.DRAINING,
    (_S.EJECTED, _E.EXCLUDED): _S.EJECTED,
}


@dataclass(slots=True, eq=False)
class Replica:
    """One endpoint. `key`: the token it is called with; `models`: the names its engine said it answers to.

    `others`: requests in flight on it through the router's other workers. Whatever weighs or bounds it looks at `load`,
    the sum of theirs and ours.
    """

    record: Record
    key: str | None
    standing: RoutingState = RoutingState.STARTING
    models: tuple[str, ...] = ()
    last_used: int = 0
    health: ReplicaHealth = field(default_factory=ReplicaHealth)
    suspect: bool = False  # it has erred: who is answered well is to tell
    trouble: str | None = None  # what the last failure was
    holds: "set[Reservation]" = field(default_factory=set)
    others: int = 0
    column: int = NOWHERE  # where the workers count its requests
    address: Address = field(init=False)
    capacity: int = field(init=False)

    def __post_init__(self) -> None:
        self.renew(self.record)
        self.address = address_of(self.record.url)

    def renew(self, record: Record) -> None:
        self.record = record
        self.capacity = record.capacity or DEFAULT_CAPACITY

    def is_at(self, record: Record) -> bool:
        """Whether the record tells of the same server."""
        own = self.record
        return (own.url, own.nonce, own.generation, own.kind) == (
            record.url, record.nonce, record.generation, record.kind,
        )  # fmt: skip

    @property
    def authorization(self) -> bytes:
        """The header line that it wants."""
        return _authorization(self.key)

    @property
    def in_flight(self) -> int:
        """Through this process."""
        return len(self.holds)

    @property
    def load(self) -> int:
        """Through the whole router."""
        return len(self.holds) + self.others

    @property
    def has_room(self) -> bool:
        return self.standing is READY and len(self.holds) + self.others < self.capacity

    @property
    def name(self) -> str:
        return self.record.replica

    @property
    def place(self) -> str:
        """Its name without the generation: what takes a replica's place takes its conversations as well."""
        return self.record.replica.rpartition(".")[0]

    def model_for(self, expert: str) -> str | None:
        """The name its engine knows this expert by; an external endpoint with one model needs none in its record."""
        named = self.record.serves.get(expert)
        return named if named is not None or len(self.models) != 1 else self.models[0]

    def apply(self, event: Event) -> None:
        self.standing = TRANSITIONS[self.standing, event]

    def lose(self) -> None:
        """Tell all who hold it that it is lost."""
        for hold in tuple(self.holds):
            hold.lose()

    def __repr__(self) -> str:
        return f"<Replica {self.name} {self.standing} {self.load}/{self.capacity}>"


class Places(Protocol):
    """What a place goes back to."""

    cells: Cells

    def offer(self, replica: Replica) -> None: ...


@dataclass(slots=True, eq=False)
class Reservation:
    """One request's place on a replica, got for `expert`. With a replica that is lost there is little idle_timer."""

    replica: Replica
    expert: str
    _table: Places
    idle_timer: IdleTimer | None = None
    lost: bool = False

    def watch(self, idle_timer: IdleTimer) -> None:
        self.idle_timer = idle_timer
        if self.lost:
            idle_timer.tighten(LOST_S)

    def lose(self) -> None:
        """Its replica is lost."""
        self.lost = True
        if self.idle_timer is not None:
            self.idle_timer.tighten(LOST_S)

    def release(self) -> None:
        replica, table = self.replica, self._table
        if self in replica.holds:
            replica.holds.remove(self)
            table.cells[replica.column] = len(replica.holds)
            table.offer(replica)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@lru_cache(maxsize=1024)
def _authorization(key: str | None) -> bytes:
    return b"" if key is None else lines({"authorization": f"Bearer {key}"})
