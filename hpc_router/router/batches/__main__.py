"""The program that runs batches: `python -m hpc_router.router.batches --run DIR --replica router-0.g1`.

It ends when no batch is left, after SIGTERM, and when its standard input is closed, so with the control process that
has started it.
"""

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

import uvloop

from hpc_router.config import frozen
from hpc_router.errors import HpcRouterError
from hpc_router.net.job_environment import END_SIGNALS, WARNING_SIGNALS
from hpc_router.net.tie import when_stdin_ends
from hpc_router.router.batches.executor import execute
from hpc_router.router.settings import with_desired
from hpc_router.state.io_thread import LOG_FORMAT
from hpc_router.state.run_directory import RunDir, open_run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hpc_router.router.batches", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--replica", required=True, help="name of the router beside which it runs")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    try:
        uvloop.run(_run(open_run(arguments.run), arguments.replica))
    except HpcRouterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


async def _run(run: RunDir, replica: str) -> None:
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    for number in (signal.SIGHUP, *WARNING_SIGNALS, *END_SIGNALS):  # only the router in this job must handle them
        signal.signal(number, signal.SIG_IGN)
    when_stdin_ends(lambda: loop.call_soon_threadsafe(stopping.set))
    await execute(run, with_desired(frozen.read(run.config), run.read_desired()), replica=replica, stopping=stopping)


if __name__ == "__main__":
    sys.exit(main())
