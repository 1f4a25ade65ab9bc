"""The simulated engine as a process: simulates loading, listens, and serves until a signal.

Exit status: 0 stopped by SIGTERM or SIGINT, 1 failed (it cannot listen, or an injected load failure), 2 invalid
arguments. Both signals stop it as SIGTERM stops vLLM (see `server`). A second SIGINT closes the remaining connections.
Logs go to stderr; stdout has only the one line of `--announce`.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

import uvloop

from hpc_router.errors import ConfigError, HpcRouterError
from hpc_router.sim.command_line import argument_parser, sim_config
from hpc_router.sim.config import SimConfig
from hpc_router.sim.faults import FaultKind
from hpc_router.sim.ranks import PEER_LOST, Rendezvous, follow_master
from hpc_router.sim.server import SimServer
from hpc_router.sim.startup_failures import fails_this_start, failure_log

log = logging.getLogger("hpc_router.sim")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    try:
        arguments = argument_parser().parse_args(argv)
        config = sim_config(arguments)
        return 0 if arguments.check else uvloop.run(_serve(config, arguments))
    except ConfigError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 2
    except HpcRouterError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1


async def _serve(config: SimConfig, arguments: argparse.Namespace) -> int:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if arguments.node_rank > 0:
        if not await follow_master(arguments.master_addr, arguments.master_port, stop):
            sys.stderr.write(f"{PEER_LOST}\n")
            return 1
        return 0
    if arguments.nnodes == 1:
        return await _serve_http(config, arguments, stop)
    async with Rendezvous(arguments.nnodes - 1, arguments.master_addr, arguments.master_port) as rendezvous:
        if await _first(rendezvous.complete, stop) is stop:
            return 0
        serving = asyncio.create_task(_serve_http(config, arguments, stop))
        gone = asyncio.create_task(rendezvous.lost.wait())
        await asyncio.wait({serving, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not serving.done() and not stop.is_set():
            sys.stderr.write(f"{PEER_LOST}\n")
            sys.stderr.flush()
            os._exit(1)  # a real engine does not continue to serve after this either
        return await serving


async def _first(*events: asyncio.Event) -> asyncio.Event:
    """Waits for these events and returns the one that is set first."""
    waiting = {asyncio.create_task(event.wait()): event for event in events}
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return waiting[done.pop()]


async def _serve_http(config: SimConfig, arguments: argparse.Namespace, stop: asyncio.Event) -> int:
    loop = asyncio.get_running_loop()
    failure = _load_failure(config)
    if failure is not None or not config.listen_while_loading:
        if await _stopped_within(stop, config.load_s):
            return 0
        config = replace(config, load_s=0.0)
    if failure is not None:
        sys.stderr.write(failure_log(failure, model=config.model) + "\n")
        return 1
    async with SimServer(config, uds=arguments.uds, host=arguments.host, port=arguments.port, crash=_die) as engine:
        log.info("simulated engine %s listens on %s", config.model, engine.address)
        if arguments.announce:
            sys.stdout.write(json.dumps({"listening": engine.address}) + "\n")
            sys.stdout.flush()
        await stop.wait()
        # Only a second Ctrl-C aborts; a second SIGTERM may be srun that repeats it.
        loop.add_signal_handler(signal.SIGINT, engine.abort)
        log.info("stopping: %d running, %d waiting", engine.counts.running, engine.counts.waiting)
    return 0


async def _stopped_within(stop: asyncio.Event, time_s: float) -> bool:
    """Waits until `stop` is set, for at most `time_s` seconds. Returns whether it is set."""
    if not time_s:
        return stop.is_set()
    try:
        async with asyncio.timeout(time_s):
            return await stop.wait()
    except TimeoutError:
        return False


def _load_failure(config: SimConfig) -> str | None:
    """Returns the reason of the failure that this start has to simulate; None for a normal start."""
    for rule in config.faults:
        if rule.fault.kind is FaultKind.LOAD_FAIL and fails_this_start(rule.fault, times=rule.times):
            return rule.fault.reason
    return None


def _die(exit_code: int | None) -> None:
    """Ends the process at once, without cleanup: with the status `exit_code`, like a crash; if that is None, by
    SIGKILL, as the OOM killer does."""
    if exit_code is not None:
        os._exit(exit_code)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
