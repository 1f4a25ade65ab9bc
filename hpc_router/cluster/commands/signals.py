"""Ctrl-C as an event: the verbs that hold jobs look at it between two steps, so no submission is cut in half."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupt_event() -> Iterator[threading.Event]:
    """Set by SIGINT or SIGTERM. After the first, the old handlers are back: a second one is meant. Outside the main
    thread there are no signals to take."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(_number: int, _frame: FrameType | None) -> None:
        event.set()
        restore()

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield event
    finally:
        restore()
