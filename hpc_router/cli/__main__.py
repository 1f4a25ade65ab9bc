"""`python -m hpc_router.cli`: the same as the `hpc-router` command."""

import sys

from hpc_router.cli.main import main

sys.exit(main())
