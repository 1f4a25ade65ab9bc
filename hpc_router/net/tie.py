"""Ties a process to the one that started it: the end of its standard input shows that the other process has ended."""

import os
import sys
import threading
from collections.abc import Callable


def when_stdin_ends(action: Callable[[], object]) -> None:
    """Calls `action` once in a background thread when standard input is closed."""
    descriptor = sys.stdin.fileno()

    def watch() -> None:
        while os.read(descriptor, 4096):  # a buffered reader would hold a lock, which aborts the exit
            pass
        action()

    threading.Thread(target=watch, name="tie", daemon=True).start()
