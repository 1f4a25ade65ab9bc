"""Lets only one process at a time read, change and write a file, on file systems without locks.

A folder serves as the lock, because creating a folder is atomic everywhere. A process that dies leaves its folder
behind, so a waiting process removes a folder that has not changed for STALE_S. It measures this time with its own
clock, because the clocks of two hosts differ.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

STALE_S: Final = 10.0
"""Time in seconds, much longer than any change takes."""
POLL_S: Final = 0.02


@contextlib.contextmanager
def exclusive(
    claim: Path, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[None]:
    """Creates the folder `claim` as the lock before the block, and removes it after the block. While another process
    has it, waits. Raises OSError if the folder cannot be created."""
    seen, since = None, clock()
    while True:
        try:
            claim.mkdir(mode=0o700)
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                found = claim.stat().st_ino, claim.stat().st_mtime_ns
                if found != seen:
                    seen, since = found, clock()
                elif clock() - since > STALE_S:
                    claim.rmdir()
                    continue
            sleep(POLL_S)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):  # a process that waited too long has removed it
            claim.rmdir()
