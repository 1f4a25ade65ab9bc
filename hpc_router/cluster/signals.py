"""Context managers that turn SIGINT and SIGTERM into an event to poll, or into KeyboardInterrupt, for blocking
commands.

Each installs its signal handlers for the duration of a `with` block and restores the earlier handlers afterwards. The
asyncio programs do not use them: they register handlers with their event loop.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C during a verb that changes a deployment. Its text says what has ended, what is left, and what
    to do."""


@contextmanager
def interrupt_event(*, once: bool = True) -> Iterator[threading.Event]:
    """Yields an event that SIGINT or SIGTERM sets, so that a command can stop between two steps, never within one.

    With `once`, a second signal raises KeyboardInterrupt, so that it ends the command at once. Outside the main thread
    the event is never set, because Python allows no signal handlers there.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_signal() -> None:
        if once and event.is_set():
            raise KeyboardInterrupt
        event.set()

    with _handler(_STOP_SIGNALS, on_signal):
        yield event


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt in the main thread during the block, so that after `scancel` the same
    clean-up runs as after Ctrl-C."""

    def on_signal() -> None:
        raise KeyboardInterrupt

    with _handler((signal.SIGTERM,), on_signal):
        yield


@contextmanager
def explaining_interrupt(text: Callable[[], str]) -> Iterator[None]:
    """Turns KeyboardInterrupt in the block into Interrupted with the text from `text`, which Ctrl-C cannot
    interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        with ignored(signal.SIGINT):
            raise Interrupted(text()) from None


@contextmanager
def ignored(*numbers: signal.Signals) -> Iterator[None]:
    """Ignores the signals during the block. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _handler(numbers: Sequence[signal.Signals], on_signal: Callable[[], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}

    def handle(_number: int, _frame: FrameType | None) -> None:
        on_signal()

    try:
        for number in numbers:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
