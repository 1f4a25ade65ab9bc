"""The simulated engines of one policy: starts them, and reads their counters."""

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from hpc_router.bench.balance.options import EXPERT, BalanceOptions
from hpc_router.bench.relay_cost.interface import log_tail
from hpc_router.bench.relay_cost.processes import process_group
from hpc_router.errors import LaunchError
from hpc_router.net.addresses import free_port
from hpc_router.net.http_client import Unreachable, call_blocking
from hpc_router.net.protocol import METRICS

START_TIMEOUT_S: Final = 60.0
_COUNTERS: Final = {
    "prompt": "vllm:prompt_tokens_total",
    "cached": "vllm:prompt_tokens_cached_total",
    "generated": "vllm:generation_tokens_total",
    "steps_s": "hpc_router_sim_step_seconds_total",
    "lost_s": "hpc_router_sim_lost_seconds_total",
}


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """Totals of one engine: tokens of prompts, of those cached ones, generated tokens; simulated seconds of its steps,
    and those by which it fell behind."""

    prompt: float
    cached: float
    generated: float
    steps_s: float
    lost_s: float

    @property
    def work(self) -> float:
        """Returns the number of computed tokens."""
        return self.prompt - self.cached + self.generated

    def minus(self, earlier: "EngineCounts") -> "EngineCounts":
        """Returns the difference to an earlier reading."""
        return EngineCounts(*(getattr(self, name) - getattr(earlier, name) for name in _COUNTERS))


@contextmanager
def engines(options: BalanceOptions, folder: Path) -> Iterator[Sequence[str]]:
    """Starts the engines, yields their URLs, and ends them with the block. Raises LaunchError."""
    ports = [free_port() for _ in range(options.replicas)]
    roofline = json.dumps({**asdict(options.engine), "slowdown": options.slowdown})
    with process_group() as processes:
        for number, port in enumerate(ports):
            argv = [
                *(sys.executable, "-m", "hpc_router.sim", "--port", str(port), "--served-model-name", EXPERT),
                *("--roofline", roofline, "--seed", str(number), "--enable-prompt-tokens-details"),
            ]
            processes.start(argv, log=folder / f"engine-{number}.log")
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        deadline = time.monotonic() + START_TIMEOUT_S
        for number, url in enumerate(urls):
            while not _answers(url):
                if processes.died() or time.monotonic() > deadline:
                    raise LaunchError(f"engine {number} did not start: {log_tail(folder / f'engine-{number}.log')}")
                time.sleep(0.1)
        yield urls


def counts(url: str) -> EngineCounts:
    """Reads the counters of an engine. Raises Unreachable."""
    text = str(call_blocking("GET", f"{url}{METRICS}").body)
    return EngineCounts(**{field: _total(text, name) for field, name in _COUNTERS.items()})


def _total(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def _answers(url: str) -> bool:
    try:
        return call_blocking("GET", f"{url}/health").status == 200
    except Unreachable:
        return False
