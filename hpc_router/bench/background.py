"""A background thread that repeats a function call, for heartbeats and progress bars."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(action: Callable[[], object], *, every_s: float) -> Iterator[None]:
    """Calls `action` every `every_s` seconds in a background thread during the block."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
