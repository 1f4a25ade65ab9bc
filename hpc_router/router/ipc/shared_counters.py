"""Counters that the router's processes share: one table in shared memory, without a lock.

Rules: each worker writes only its own row, and only aligned cells of 8 bytes, which a processor stores and loads whole.
No decision combines two cells, so the order in which stores become visible (aarch64) does not matter. The supervisor
clears the row of a worker that has ended. The control process assigns columns; it reuses one only after all others,
and only when every worker's cell in it is zero.
"""

import mmap
from collections.abc import Collection, Sequence
from typing import Final

from hpc_router.relay.in_flight import Cells
from hpc_router.router.replicas.replica import NO_COLUMN

COLUMNS: Final = 2**13
IN_FLIGHT: Final = 1
"""Column of the requests that a worker serves."""
CUT_OFF: Final = 2
"""Column of the requests that a worker cut off after `router.drain_s`."""
_FIRST: Final = 3
_CELL: Final = 8


class Counters:
    """Created before the processes are forked, so that all of them map it. Pages never written take no memory."""

    def __init__(self, *, workers: int) -> None:
        self.workers = workers
        self._cells = memoryview(mmap.mmap(-1, (workers + 1) * COLUMNS * _CELL)).cast("q")
        self._own = self._row(workers)  # of the control process: its first cell is the next column to assign
        if not self._own[NO_COLUMN]:
            self._own[NO_COLUMN] = _FIRST

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
        """Zero the row of a worker that has ended."""
        self._row(worker)[:] = memoryview(bytes(COLUMNS * _CELL)).cast("q")

    def allocate(self, used: Collection[int]) -> int:
        """A column that is not in use. Only the control process calls this; its successor continues from there."""
        for _ in range(COLUMNS):
            column = self._own[NO_COLUMN]
            self._own[NO_COLUMN] = column + 1 if column + 1 < COLUMNS else _FIRST
            if column not in used and not any(row[column] for row in self.all()):
                return column
        raise AssertionError("unreachable: there are more columns than replicas and experts")

    def counts(self, worker: int) -> list[int]:
        """All cells of its row but the unassigned one."""
        return self._row(worker).tolist()[NO_COLUMN + 1 :]

    def nonzero(self) -> int:
        """How many cells of all workers are not zero."""
        return sum(1 for worker in range(self.workers) for count in self.counts(worker) if count)

    def _row(self, worker: int) -> memoryview:
        return self._cells[worker * COLUMNS : (worker + 1) * COLUMNS]
