"""The simulated engine as a process: parses arguments, simulates loading, listens, and serves until a signal.

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
from pathlib import Path

import uvloop

from hpc_router.config.parsing import parse
from hpc_router.config.schema import Roofline
from hpc_router.errors import ConfigError, HpcRouterError
from hpc_router.sim.config import SimConfig
from hpc_router.sim.faults import FaultKind, Rule, parse_rules
from hpc_router.sim.ranks import PEER_LOST, Rendezvous, follow_master
from hpc_router.sim.server import SimServer
from hpc_router.sim.startup_failures import fails_this_start, failure_log

log = logging.getLogger("hpc_router.sim")

_DESCRIPTION = """\
A simulated engine with the API of vLLM's OpenAI server: seeded answers and latencies, injected faults, no model.
Every response is labelled simulated."""

_EPILOG = """\
faults: a JSON list of objects, each with a kind and its keys, and the requests that it hits (times, every,
probability, path, model), for example
  [{"kind": "status", "status": 429, "retry_after_s": 1, "every": 10}, {"kind": "die", "at": 3, "times": 1}]
kinds: die(at, exit_code) hang(at, for_s) status(status, retry_after_s, message) slow(factor) error_event(at, message)
cut(at) garbage(at) reset(at) partial_body() load_fail(reason, counter); at: a number of tokens, "first_token",
"headers", for reset also "connect". Change them later with POST /sim/faults, or per request with the header
x-sim-fault or the body field sim_fault. GET /sim/last?n=1 returns the last request."""


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    try:
        arguments = _parser().parse_args(argv)
        config = _config(arguments)
        return 0 if arguments.check else uvloop.run(_serve(config, arguments))
    except ConfigError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 2
    except HpcRouterError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    default = SimConfig()
    parser = argparse.ArgumentParser(
        prog="python -m hpc_router.sim",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, kind: type[int] | type[float], value: float | None, metavar: str, text: str) -> None:
        default_text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        parser.add_argument(flag, type=kind, default=value, metavar=metavar, help=f"{text} (default {default_text})")

    parser.add_argument("--check", action="store_true", help="check the options, then end")
    parser.add_argument("--uds", type=Path, metavar="PATH", help="listen on this unix socket instead of a TCP port")
    parser.add_argument("--host", default="127.0.0.1", help="TCP address (default 127.0.0.1)")
    add("--port", int, 0, "PORT", "TCP port; 0: the kernel chooses one")
    parser.add_argument(
        "--announce", action="store_true", help='print {"listening": ADDRESS} on stdout once it listens'
    )
    parser.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", default=list(default.served_model_names),
        help="model names of requests; the first is the one in responses (default sim)",
    )  # fmt: skip
    parser.add_argument(
        "--lora-modules", nargs="+", metavar="NAME=PATH", default=[],
        help="names of further models, as vLLM takes them; the paths are not read",
    )  # fmt: skip
    add("--seed", int, default.seed, "N", "seed of answers, latencies and faults")
    add("--ttft-ms", float, default.ttft_s * 1e3, "MS", "mean time to the first token")
    add("--itl-ms", float, default.itl_s * 1e3, "MS", "mean time between tokens")
    add("--jitter", float, default.jitter, "SIGMA", "log-normal spread of both; 0: none")
    add("--load-s", float, default.load_s, "S", "time to load before it listens")
    parser.add_argument("--listen-while-loading", action="store_true", help="listen at once, answer 503 until loaded")
    add("--capacity", int, default.capacity, "N", "requests that run at once; others wait")
    parser.add_argument(
        "--scheduling-policy", choices=("fcfs", "priority"), default=default.scheduling_policy,
        help="order of requests that wait: by arrival, or first by `priority`, the lowest value first (default fcfs)",
    )  # fmt: skip
    add("--max-tokens-default", int, default.max_tokens_default, "N", "mean length of an answer that ends by itself")
    add("--max-model-len", int, default.max_model_len, "N", "longest prompt plus answer, in words")
    caching = default.enable_prefix_caching
    parser.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=caching,
        help=f"do not compute again what is in the KV cache (default {'on' if caching else 'off'})",
    )  # fmt: skip
    add("--block-size", int, default.block_size, "N", "tokens per block of the KV cache")
    add("--num-gpu-blocks-override", int, None, "N", "blocks of the KV cache; none: what fits on the GPU")
    parser.add_argument(
        "--enable-prompt-tokens-details", action="store_true", help="name cached prompt tokens in the usage of answers"
    )
    add("--embedding-dimensions", int, default.embedding_dimensions, "N", "length of embedding vectors")
    add("--keepalive-s", float, default.keepalive_s, "S", "idle connections are closed after this time")
    add(
        "--drain-s", float, default.drain_s, "S", "at SIGTERM, running requests may finish for this long; 0: abort them"
    )
    parser.add_argument(
        "--roofline", metavar="JSON", help="the engine on GPUs whose latencies are predicted (docs/simulation.md)"
    )
    parser.add_argument("--faults", metavar="JSON|@FILE", help="the fault schedule, see below")
    add("--nnodes", int, 1, "N", "number of ranks; they meet at the master's port before rank 0 loads")
    add("--node-rank", int, 0, "R", "the rank of this process; only rank 0 listens")
    parser.add_argument(
        "--master-addr", default="127.0.0.1", help="address at which rank 0 waits for the others (default 127.0.0.1)"
    )
    add("--master-port", int, 29500, "PORT", "port at that address")
    return parser


def _config(arguments: argparse.Namespace) -> SimConfig:
    if not 0 <= arguments.port <= 65_535:
        raise ConfigError(f"--port: {arguments.port} is not a port (valid: 0 to 65535)")
    if arguments.uds is not None and not arguments.uds.parent.is_dir():
        raise ConfigError(f"--uds: the folder {arguments.uds.parent} does not exist")
    return SimConfig(
        served_model_names=tuple(arguments.served_model_name),
        adapters=tuple(map(_adapter, arguments.lora_modules)),
        seed=arguments.seed,
        ttft_s=arguments.ttft_ms / 1e3,
        itl_s=arguments.itl_ms / 1e3,
        jitter=arguments.jitter,
        load_s=arguments.load_s,
        listen_while_loading=arguments.listen_while_loading,
        capacity=arguments.capacity,
        scheduling_policy=arguments.scheduling_policy,
        max_tokens_default=arguments.max_tokens_default,
        max_model_len=arguments.max_model_len,
        enable_prefix_caching=arguments.enable_prefix_caching,
        block_size=arguments.block_size,
        num_gpu_blocks_override=arguments.num_gpu_blocks_override,
        enable_prompt_tokens_details=arguments.enable_prompt_tokens_details,
        embedding_dimensions=arguments.embedding_dimensions,
        keepalive_s=arguments.keepalive_s,
        drain_s=arguments.drain_s,
        faults=_rules(arguments.faults),
        roofline=_roofline(arguments.roofline),
    )


def _adapter(text: str) -> str:
    """Returns the adapter's name from `NAME=PATH` or from vLLM's JSON form."""
    try:
        return str(json.loads(text)["name"]) if text.startswith("{") else text.partition("=")[0]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--lora-modules: {text}: not NAME=PATH, and not JSON with a name") from error


def _roofline(text: str | None) -> Roofline | None:
    """Returns the options of the roofline model, which are JSON on the command line; None if there are none."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--roofline: not JSON: {error}") from error
    return parse(Roofline, value, at="roofline")


def _rules(text: str | None) -> tuple[Rule, ...]:
    """Returns the fault rules of the command line."""
    if text is None:
        return ()
    if not text.startswith("@"):
        return parse_rules(text)
    try:
        return parse_rules(Path(text[1:]).read_text())
    except OSError as exc:
        raise ConfigError(f"--faults: cannot read {text[1:]}: {exc.strerror}") from exc


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
