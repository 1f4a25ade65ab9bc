"""The command line: parses arguments, calls the verbs, prints results and returns exit statuses."""

import sys
from typing import Final

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C."""


def run() -> int:
    """Runs the command `hpc-router` and returns its exit status. Ctrl-C while its modules are imported, which takes a
    few tenths of a second, prints no traceback."""
    try:
        from hpc_router.cli.main import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("hpc-router: interrupted\n")
        return INTERRUPTED
