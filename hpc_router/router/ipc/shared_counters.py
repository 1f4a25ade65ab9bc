"""Counters that the router's processes share: one table in shared memory, without a lock.

Each worker writes only its own row, and only aligned cells of 8 bytes, which a processor stores and loads as a whole.
No decision needs two cells to be consistent, so the order in which stores become visible (aarch64) does not matter. The
supervisor clears the row of a worker that has ended. The control process assigns the columns; it reuses a column only
after it has used all others, and only when every worker's cell in that column is zero.

The order of waiting requests (`replicas.fair_order`) has a table of its own, in which an expert's queue has the same
column as in the table of counters. The counts of users' tokens are in a third table, whose columns follow from a
token's slot. In that table, only an ended worker's numbers of requests in flight are cleared; its counts of the present
minute stay, and the worker that replaces it continues them.
"""

import mmap
from collections.abc import Collection, Sequence
from typing import Final

from hpc_router.relay.in_flight import Cells
from hpc_router.router.access.window_count import TOKEN_CELLS
from hpc_router.router.replicas.fair_order import SharedOrder, cells_for
from hpc_router.router.replicas.replica import NO_COLUMN, PREFILL_COLUMNS
from hpc_router.state.user_tokens import SLOTS

COLUMNS: Final = PREFILL_COLUMNS
"""Number of columns that can be assigned. A second half of each row has the prefill that is pending, by the same
columns."""
_ROW: Final = 2 * COLUMNS
IN_FLIGHT: Final = 1
"""Column with the number of requests that a worker serves."""
CUT_OFF: Final = 2
"""Column with the number of requests that a worker cut off after `router.drain_s`."""
_FIRST: Final = 3
_CELL: Final = 8
_ORDER_CELLS: Final = cells_for(COLUMNS)


class Counters:
    """The tables: each has a row per worker, and the first one also a row of the control process. They are created
    before the processes are forked, so that all of them share the memory. Pages that are never written take none."""

    def __init__(self, *, workers: int) -> None:
        self.workers = workers
        self._cells = memoryview(mmap.mmap(-1, (workers + 1) * _ROW * _CELL)).cast("q")
        self._token_cells = memoryview(mmap.mmap(-1, workers * TOKEN_CELLS * SLOTS * _CELL)).cast("q")
        self._order_cells = memoryview(mmap.mmap(-1, workers * _ORDER_CELLS * _CELL)).cast("q")
        self._own = self._row(workers)  # row of the control process; its first cell is the next column to assign
        if not self._own[NO_COLUMN]:
            self._own[NO_COLUMN] = _FIRST

    def row(self, worker: int) -> Cells:
        return self._row(worker)

    def others(self, worker: int) -> Sequence[Cells]:
        """Returns the rows of all workers except this one."""
        return tuple(self._row(other) for other in range(self.workers) if other != worker)

    def token_row(self, worker: int) -> Cells:
        """Returns the worker's row of the counts of users' tokens (`window_count`)."""
        return self._token_row(worker)

    def token_others(self, worker: int) -> Sequence[Cells]:
        """Returns the rows of the counts of users' tokens of all workers except this one."""
        return tuple(self._token_row(other) for other in range(self.workers) if other != worker)

    def order(self, worker: int) -> SharedOrder:
        """Returns the order of waiting requests as this worker sees it."""
        peers = tuple(self._order_row(other) for other in range(self.workers) if other != worker)
        return SharedOrder(self._order_row(worker), peers, worker)

    def order_of_all(self) -> SharedOrder:
        """Returns the order of waiting requests for the control process, which only reads that of all workers."""
        return SharedOrder(peers=tuple(map(self._order_row, range(self.workers))))

    def all(self) -> Sequence[Cells]:
        return tuple(map(self._row, range(self.workers)))

    def total(self, column: int) -> int:
        return sum(row[column] for row in self.all())

    def clear(self, worker: int) -> None:
        """Clears what a worker that has ended had in flight and in its queues: its rows, except the counts per minute
        of users' tokens."""
        self._row(worker)[:] = memoryview(bytes(_ROW * _CELL)).cast("q")
        self._order_row(worker)[:] = memoryview(bytes(_ORDER_CELLS * _CELL)).cast("q")
        self._token_row(worker)[::TOKEN_CELLS] = memoryview(bytes(SLOTS * _CELL)).cast("q")

    def allocate(self, used: Collection[int]) -> int:
        """Returns a column that is not in `used` and has only zeros. Only the control process calls this. The next
        column to try is in shared memory, so that a control process that replaces another continues there."""
        for _ in range(COLUMNS):
            column = self._own[NO_COLUMN]
            self._own[NO_COLUMN] = column + 1 if column + 1 < COLUMNS else _FIRST
            if column not in used and not any(row[column] for row in self.all()):
                return column
        raise AssertionError("unreachable: there are more columns than replicas and experts")

    def counts(self, worker: int) -> list[int]:
        """Returns all cells of the worker's row except `NO_COLUMN`, which is never assigned."""
        return self._row(worker).tolist()[NO_COLUMN + 1 :]

    def nonzero(self) -> int:
        """Returns the number of cells of all workers that are not zero; 0 if nothing is in flight or waits."""
        return sum(1 for worker in range(self.workers) for count in self.counts(worker) if count)

    def _token_row(self, worker: int) -> memoryview:
        size = TOKEN_CELLS * SLOTS
        return self._token_cells[worker * size : (worker + 1) * size]

    def _order_row(self, worker: int) -> memoryview:
        return self._order_cells[worker * _ORDER_CELLS : (worker + 1) * _ORDER_CELLS]

    def _row(self, worker: int) -> memoryview:
        return self._cells[worker * _ROW : (worker + 1) * _ROW]
