"""The program of the router's job: `python -m hpc_router.router --run DIR --replica router-0.g1`."""

import argparse
import sys
from pathlib import Path

from hpc_router.config import frozen
from hpc_router.errors import HpcRouterError
from hpc_router.router.main import main as serve
from hpc_router.state.run_directory import open_run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hpc_router.router", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--replica", required=True, help="the router's replica name, such as router-0.g1")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config of this router (default: the run's)")
    arguments = parser.parse_args()
    try:
        run = open_run(arguments.run)
        return serve(run, frozen.read(arguments.config or run.config), replica=arguments.replica)
    except HpcRouterError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
