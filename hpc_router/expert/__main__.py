"""Runs one replica of an expert, as a job or by hand: `python -m hpc_router.expert --run DIR --replica math-0.g1`."""

import argparse
import sys
from pathlib import Path

from hpc_router.expert.job import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hpc_router.expert", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--replica", required=True, help="replica name, such as math-0.g1")
    arguments = parser.parse_args()
    sys.exit(main(arguments.run, arguments.replica))
