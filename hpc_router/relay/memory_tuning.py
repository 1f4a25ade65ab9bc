"""Memory in processes that run for long: Python's garbage collector, and the C library's heap.

In those that relay, a request makes a hundred small objects and hardly a cycle among them. With the collector's own
thresholds the young generation would be searched for every few requests, and everything that is loaded now and then,
for tens of milliseconds in which no stream moves.

The heap's free end goes back to the kernel as soon as it is twice as long as the longest piece that was ever freed. So
a few long bodies at a time took their pages anew with every request: 200 KB cost 350 us more, on a virtual machine.
"""

import ctypes
import gc
from contextlib import suppress
from typing import Final

YOUNG: Final = 20_000
"""Objects more than there were after the last search, before the young ones are searched again."""

KEPT_BYTES: Final = 32 * 2**20
"""So much may lie free at the heap's end."""
MAX_KEPT_BYTES: Final = 4 * 2**20
"""From this size on a piece of memory is the kernel's again once it is free."""
_TRIM_THRESHOLD: Final = -1  # of mallopt(3), in glibc's malloc.h
_MMAP_THRESHOLD: Final = -3


def tune() -> None:
    """What is loaded is there to stay, and is not searched again: pages that are shared stay so."""
    gc.collect()
    gc.freeze()


def tune_for_relay() -> None:
    """As `tune`, and what comes after it is searched rarely; memory of requests is kept for the next ones."""
    tune()
    gc.set_threshold(YOUNG, 20, 50)
    with suppress(AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, MAX_KEPT_BYTES)
