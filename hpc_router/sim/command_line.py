"""The command line of the simulated engine, and the settings that result from it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hpc_router.config.parsing import parse
from hpc_router.config.schema import Roofline
from hpc_router.errors import ConfigError
from hpc_router.sim.config import SimConfig
from hpc_router.sim.faults import Rule, parse_rules

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


def argument_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Returns the parser of all options of a simulated engine, an object of the class `kind`."""
    default = SimConfig()
    parser = kind(
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


def sim_config(arguments: argparse.Namespace) -> SimConfig:
    """Returns the settings in parsed options. Raises ConfigError for a value that is not valid."""
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


class _RaisingParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def settings_of(argv: Sequence[str]) -> SimConfig:
    """Returns the settings of the engine that the command `PYTHON -m hpc_router.sim OPTION ...` would start. Raises
    ConfigError if an option is not valid."""
    return sim_config(argument_parser(_RaisingParser).parse_args(argv[3:]))
