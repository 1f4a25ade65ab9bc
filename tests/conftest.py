"""What every test may rely on: Ctrl-C works, also where pytest itself runs in a shell's background."""

import signal


def pytest_configure() -> None:
    """A background shell leaves SIGINT ignored, and every process started by a test would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
