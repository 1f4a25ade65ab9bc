"""The fair order of waiting requests: classes get places in proportion to their weights, and the users of a class get
equal shares. No I/O, no clock.

A request that waits for an expert gets a number, its tag, when it joins the expert's queue; the lowest tag is next.
This is self-clocked fair queueing (Golestani, INFOCOM 1994): the tag is the request's virtual finish time. The present
virtual time is the tag of the request that got a place last. A user's first waiting request gets the virtual time plus
the length of one request (`UNIT`), and each further one gets the previous tag plus `UNIT`. So a user's first request
waits for at most one request of each other user, however many requests these have sent before.

All workers of the router keep one order. Each worker publishes in shared memory, per expert and class, the lowest tag
among its waiting requests and the virtual time that it knows; only that worker writes these cells. A reader takes the
lowest tag and the highest virtual time of all workers. If a worker has only a third of a user's waiting requests, it
spaces their tags three times as far apart, as the user's other requests wait at other workers.
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
    """The class of a request, most important first. The value is the request's `priority` for engines that obey it."""

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
    """The class and the user of a request, whose waiting requests share one sequence of tags. `slot`: the number of the
    user's token (see `state.user_tokens`)."""

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
    """Returns the number of cells that one worker needs for `columns` queues: numbers of waiting requests, by user and
    in all, and then the state of each queue."""
    return _QUEUES + columns * _CELLS


def _cell(column: int, cell: int, of: RequestClass) -> int:
    return _QUEUES + column * _CELLS + cell + of


class QueueHead(NamedTuple):
    """The first waiting request of the other workers: its tag, and the number of its worker. Of two with the same tag,
    that of the worker with the lower number is first."""

    tag: int
    worker: int


@dataclass(slots=True)
class SharedOrder:
    """The shared state of all queues of the router, as one worker sees it.

    `cells`: the worker's own cells in shared memory; `peers`: the cells of the other workers; `worker`: its number. A
    queue is addressed by the number of its column, which is the same in all workers. An expert has column 0 until the
    control process has assigned it another one; workers do not read each other's column 0.
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
        """Returns the first request of class `of` that waits in this queue at another worker; None if there is none."""
        lowest, at = None, _cell(column, _HEAD, of)
        for index, row in enumerate(self.peers if column else ()):
            tag = row[at]
            if tag and (lowest is None or tag < lowest.tag):
                lowest = QueueHead(tag, index + (index >= self.worker))
        return lowest

    def others_waiting(self, column: int, of: RequestClass) -> int:
        """Returns the number of requests of class `of` that wait in this queue at the other workers."""
        return self._sum_of_others(column, _cell(column, _WAITING, of))

    def others_in_flight(self, column: int, of: RequestClass) -> int:
        """Returns the number of requests of class `of` that other workers have in flight on the column's expert."""
        return self._sum_of_others(column, _cell(column, _IN_FLIGHT, of))

    def count_user(self, slot: int, change: int) -> None:
        """Adds `change` to the number of requests that wait here for the user whose token has the number `slot`."""
        self.cells[slot] += change

    def next_tag(self, column: int, of: RequestClass, *, last: int, slot: int) -> int:
        """Returns the tag of a request of class `of` that joins a queue of this worker. `last`: the tag of its user's
        last waiting request there, 0 if none waits. `slot`: number of the user's token; the request is counted there
        already."""
        own = self.cells[slot]
        total = own + sum(row[slot] for row in self.peers)
        return max(last, self._highest(column, _cell(column, _TIME, of))) + UNIT * total // max(1, own)

    def turn(self, columns: Collection[int], of: RequestClass, weight: float) -> int:
        """Returns the virtual time at which class `of` next gets a place on a replica that serves the queues `columns`.
        Of all classes, the one with the earliest such time is next. A class that had no request for some time is due at
        once, but does not get the places that it did not use meanwhile."""
        last = max(self._highest(column, _cell(column, _TURN, of)) for column in columns)
        now = max(self._highest(column, _cell(column, _TURN, other)) for column in columns for other in CLASSES)
        return max(last + int(UNIT / weight), now)

    def granted(self, columns: Collection[int], of: RequestClass, *, tag: int, turn: int) -> None:
        """Advances the virtual time of the queues `columns` after their replica has taken a request of class `of`.
        `tag`: the tag of the request; `turn`: the virtual time at which its class was due."""
        for column in columns:
            for at, value in ((_cell(column, _TIME, of), tag), (_cell(column, _TURN, of), turn)):
                self.cells[at] = max(self.cells[at], value)

    def move(self, column: int, to: int) -> None:
        """Moves the values of a queue in this worker's cells from `column` to the column `to`."""
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
