"""What the router's processes count together: one table in memory that they share, without a lock.

Rules: a row per worker, which alone writes it, and only aligned cells of 8 bytes, which a processor stores and loads
whole. Each cell stands for itself: nobody concludes from one cell what another holds, so the order in which stores
become visible (aarch64) does not matter. Whoever sees to a worker's end clears its row. A column means what the
control process says; it hands one out again only after all others, and only when nobody counts in it.
"""

import mmap
from collections.abc import Collection, Sequence
from typing import Final

from hpc_router.relay.in_flight import Cells

COLUMNS: Final = 2**13
NOWHERE: Final = 0
"""Written by whoever has no column yet, read by nobody."""
IN_FLIGHT: Final = 1
"""Requests that a worker serves."""
CUT: Final = 2
"""Requests that a worker cut off at the end of its time to drain."""
_FIRST: Final = 3
_CELL: Final = 8


class Counters:
    """Made before the processes are forked, which then all see it. Pages that nobody writes cost nothing."""

    def __init__(self, *, workers: int) -> None:
        self.workers = workers
        self._cells = memoryview(mmap.mmap(-1, (workers + 1) * COLUMNS * _CELL)).cast("q")
        self._own = self._row(workers)  # the control process's
        if not self._own[NOWHERE]:
            self._own[NOWHERE] = _FIRST

    def row(self, worker: int) -> Cells:
        return self._row(worker)

    def others(self, worker: int) -> Sequence[Cells]:
        """The rows of all other workers."""
        return tuple(self._row(other) for other in range(self.workers) if other != worker)

    def all(self) -> Sequence[Cells]:
        return tuple(map(self._row, range(self.workers)))

    def total(self, column: int) -> int:
        return sum(row[column] for row in self.all())

    def clear(self, worker: int) -> None:
        """Of a worker that has ended."""
        self._row(worker)[:] = memoryview(bytes(COLUMNS * _CELL)).cast("q")

    def allocate(self, taken: Collection[int]) -> int:
        """A column that nobody uses. The control process's alone; its successor goes on where it stood."""
        for _ in range(COLUMNS):
            column = self._own[NOWHERE]
            self._own[NOWHERE] = column + 1 if column + 1 < COLUMNS else _FIRST
            if column not in taken and not any(row[column] for row in self.all()):
                return column
        raise AssertionError("unreachable: there are more columns than replicas and experts")

    def counts(self, worker: int) -> list[int]:
        """Whatever it counts, without saying where."""
        return self._row(worker).tolist()[NOWHERE + 1 :]

    def nonzero(self) -> int:
        """Cells of all workers that are not zero."""
        return sum(1 for worker in range(self.workers) for count in self.counts(worker) if count)

    def _row(self, worker: int) -> memoryview:
        return self._cells[worker * COLUMNS : (worker + 1) * COLUMNS]
