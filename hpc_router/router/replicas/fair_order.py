"""The fair order of waiting requests: classes share by weight, the users of a class equally. No I/O, no clock.

Each request that waits for an expert gets a tag when it joins the queue: its virtual finish time. The tags of one
user's requests follow each other at a distance of one request, and the first one follows the virtual time, which is the
tag of the request that got the last place (self-clocked fair queueing, Golestani, INFOCOM 1994). So a user's first
request is next after at most one request of each other user, however many these have sent before.

The order is one over all workers of the router: each worker publishes, per expert and class, the lowest tag among its
waiting requests and the virtual time that it knows. All of these are cells of shared memory with one writer each; a
reader takes the lowest tag and the highest time of all workers. A user's requests count over all workers: if a worker
has a third of them, their tags there lie three requests apart.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

from hpc_router.relay.in_flight import Cells
from hpc_router.state.user_tokens import SLOTS

UNIT: Final = 2**20
"""Length of one request in virtual time."""


class RequestClass(IntEnum):
    """The class of a request, highest first. The value is also the `priority` that an engine gets."""

    INTERACTIVE = 0
    BATCH = 1

    @property
    def label(self) -> str:
        return self.name.lower()


INTERACTIVE: Final = RequestClass.INTERACTIVE  # an attribute look-up in the enum costs more
CLASSES: Final = tuple(RequestClass)
LOWEST: Final = CLASSES[-1]
"""The class whose requests are shed first."""
OWNER_SLOT: Final = SLOTS
"""The slot of the owner, who has no user's token."""


class Flow(NamedTuple):
    """Whose request it is. `slot`: the number of the user's token (see `state.user_tokens`)."""

    request_class: RequestClass
    user: str
    slot: int


OWNERS_FLOW: Final = Flow(RequestClass.INTERACTIVE, "", OWNER_SLOT)
_COUNT: Final = len(CLASSES)
_HEAD: Final = 0  # the lowest tag of a waiting request that any replica may serve; 0: there is none
_TIME: Final = _COUNT  # virtual time within the class
_TURN: Final = 2 * _COUNT  # virtual time at which the class had its last turn
_WAITING: Final = 3 * _COUNT  # number of waiting requests
_IN_FLIGHT: Final = 4 * _COUNT  # number of requests in flight, if the class has a limit
_CELLS: Final = 5 * _COUNT
WAITING_AT_ALL: Final = OWNER_SLOT + 1
"""The cell with the number of a worker's requests that wait for any expert."""
_QUEUES: Final = OWNER_SLOT + 2


def cells_for(columns: int) -> int:
    """Returns the number of cells of one worker with this number of queues: first one per user with the number of
    his waiting requests, one with the number of all, then those of each queue."""
    return _QUEUES + columns * _CELLS


def _cell(column: int, cell: int, of: RequestClass) -> int:
    return _QUEUES + column * _CELLS + cell + of


class QueueHead(NamedTuple):
    """The lowest tag that another worker has published, and the number of that worker. The order of heads with equal
    tags is that of the workers."""

    tag: int
    worker: int


@dataclass(slots=True)
class SharedOrder:
    """The shared state of all queues of the router, as one worker sees it.

    `cells`: the worker's own row; `peers`: the rows of the other workers; `worker`: its number. A queue is addressed by
    its column. Column 0 is that of an expert to which the control process has assigned none yet; others do not read it.
    """

    cells: Cells = field(default_factory=lambda: defaultdict[int, int](int))
    peers: Sequence[Cells] = ()
    worker: int = 0

    def publish(self, column: int, of: RequestClass, *, head: int, waiting: int) -> None:
        self.cells[_cell(column, _HEAD, of)] = head
        self.cells[_cell(column, _WAITING, of)] = waiting

    def publish_in_flight(self, column: int, of: RequestClass, count: int) -> None:
        self.cells[_cell(column, _IN_FLIGHT, of)] = count

    def head(self, column: int, of: RequestClass) -> QueueHead | None:
        """Returns the first request of the other workers; None if none of them waits."""
        lowest, at = None, _cell(column, _HEAD, of)
        for index, row in enumerate(self.peers if column else ()):
            tag = row[at]
            if tag and (lowest is None or tag < lowest.tag):
                lowest = QueueHead(tag, index + (index >= self.worker))
        return lowest

    def others_waiting(self, column: int, of: RequestClass) -> int:
        """Returns the number of requests of the class that wait at the other workers."""
        return self._sum_of_others(column, _cell(column, _WAITING, of))

    def others_in_flight(self, column: int, of: RequestClass) -> int:
        """Returns the number of requests of the class that the other workers have in flight."""
        return self._sum_of_others(column, _cell(column, _IN_FLIGHT, of))

    def count_user(self, slot: int, change: int) -> None:
        """Adds `change` to the number of the user's requests that wait at this worker."""
        self.cells[slot] += change

    def next_tag(self, column: int, of: RequestClass, *, last: int, slot: int) -> int:
        """Returns the tag of a request that joins a queue. `last`: the tag of the last waiting request of its user at
        this worker, 0 if none waits; `slot`: that of the user, whose waiting requests are counted already."""
        own = self.cells[slot]
        total = own + sum(row[slot] for row in self.peers)
        return max(last, self._highest(column, _cell(column, _TIME, of))) + UNIT * total // max(1, own)

    def turn(self, columns: Collection[int], of: RequestClass, weight: float) -> int:
        """Returns the virtual time of the class's next turn at a replica that serves these queues. The class with the
        earliest turn is next. A class that had no request for some time is due at once, and does not catch up on
        earlier turns."""
        last = max(self._highest(column, _cell(column, _TURN, of)) for column in columns)
        now = max(self._highest(column, _cell(column, _TURN, other)) for column in columns for other in CLASSES)
        return max(last + int(UNIT / weight), now)

    def granted(self, columns: Collection[int], of: RequestClass, *, tag: int, turn: int) -> None:
        """Advances the virtual time of these queues, whose replica has taken a request with this tag and turn."""
        for column in columns:
            for at, value in ((_cell(column, _TIME, of), tag), (_cell(column, _TURN, of), turn)):
                self.cells[at] = max(self.cells[at], value)

    def move(self, column: int, to: int) -> None:
        """Moves the worker's cells of a queue to another column."""
        for of in CLASSES:
            for cell in range(0, _CELLS, _COUNT):
                self.cells[_cell(to, cell, of)] = self.cells[_cell(column, cell, of)]
                self.cells[_cell(column, cell, of)] = 0

    def _sum_of_others(self, column: int, at: int) -> int:
        return sum(row[at] for row in self.peers) if column else 0

    def _highest(self, column: int, at: int) -> int:
        highest = self.cells[at]
        for row in self.peers if column else ():
            highest = max(highest, row[at])
        return highest
