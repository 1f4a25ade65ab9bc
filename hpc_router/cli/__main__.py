"""`python -m hpc_router.cli`: the same as the `hpc-router` command."""

import sys

from hpc_router.cli import run

sys.exit(run())
