"""Settings of the garbage collector and of glibc's heap for processes that run for a long time.

A relayed request creates about a hundred small objects and almost no reference cycles. With Python's default
thresholds, the collector would scan the young generation every few requests and sometimes all loaded modules, which
blocks the event loop for tens of milliseconds.

By default glibc returns the free end of the heap to the kernel when it is twice as long as the longest block that was
freed. A few concurrent long bodies then cause page faults in every request: 350 us for 200 KB, on a virtual machine.
"""

import ctypes
import gc
from contextlib import suppress
from typing import Final

YOUNG_THRESHOLD: Final = 20_000
"""Number of net allocations between two scans of the young generation."""

TRIM_THRESHOLD_BYTES: Final = 32 * 2**20
"""Maximum number of free bytes at the end of the heap; glibc returns more to the kernel."""
MMAP_THRESHOLD_BYTES: Final = 4 * 2**20
"""Minimum size of a block that is mapped for itself, and unmapped when it is freed."""
_TRIM_THRESHOLD: Final = -1  # parameter of mallopt(3), from glibc's malloc.h
_MMAP_THRESHOLD: Final = -3


def tune() -> None:
    """Excludes all objects that exist now from later scans of the garbage collector. A scan writes to the objects, so
    their memory pages would no longer be shared with forked processes."""
    gc.collect()
    gc.freeze()


def tune_for_relay() -> None:
    """Does the same as `tune`, makes scans of later objects rare, and keeps the memory that finished requests free for
    later requests."""
    tune()
    gc.set_threshold(YOUNG_THRESHOLD, 20, 50)
    with suppress(AttributeError):  # the C library is not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
        mallopt(_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
