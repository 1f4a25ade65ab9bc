"""What every test may rely on: processes it starts take Ctrl-C and buffer their output, as a user's do."""

import os
import signal


def pytest_configure() -> None:
    """A background shell leaves SIGINT ignored, and every process started by a test would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("PYTHONUNBUFFERED", None)
