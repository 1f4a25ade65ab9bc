"""`hpc-router bench agreement`: our load generator's figures beside those of `vllm bench serve`, on one deployment.

The same prompts and as many users, in turn; every other round theirs comes first. docs/bench.md says where their
definitions differ from ours.
"""

import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.config import BenchConfig, read_config
from hpc_router.bench.figures import Figures, figures
from hpc_router.bench.load.generator import LoadTarget, carry_out
from hpc_router.bench.prompts import BenchPrompt, built_in
from hpc_router.bench.relay_cost.run import origin_of
from hpc_router.bench.relay_cost.statistics import RoundSpread
from hpc_router.bench.workload import Point, workload
from hpc_router.cluster.commands.router_access import router_access
from hpc_router.errors import LaunchError
from hpc_router.state.atomic_files import replace_text
from hpc_router.state.run_directory import RunDir

SCHEMA: Final = 1
PATIENCE_S: Final = 900.0
FIGURES: Final[Mapping[str, str]] = {
    "TTFT p50 ms": "median_ttft_ms",
    "TTFT p99 ms": "p99_ttft_ms",
    "TPOT p50 ms": "median_tpot_ms",
    "ITL mean ms": "mean_itl_ms",
    "E2E p50 ms": "median_e2el_ms",
    "E2E p99 ms": "p99_e2el_ms",
    "output tokens": "total_output_tokens",
    "requests that failed": "failed",
}
"""What is compared, by its name in their result. Rates are not: theirs count the run-up and the end, ours do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementOptions:
    """`vllm`: an interpreter that has it. `tokenizer`: a model folder, any: their tool wants one. `requests`: measured
    ones of each tool in each round."""

    vllm: str
    tokenizer: Path
    out: Path
    model: str = "auto"
    users: int = 8
    requests: int = 200
    tokens: int = 32
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Rounds:
    """One value per round of each figure."""

    ours: Mapping[str, Sequence[float]]
    theirs: Mapping[str, Sequence[float]]

    def table(self) -> list[tuple[str, RoundSpread, RoundSpread, RoundSpread | None]]:
        """Ours, theirs, ours / theirs within a round; no ratio where theirs is 0."""
        rows = []
        for name in FIGURES:
            ours, theirs = self.ours[name], self.theirs[name]
            ratio = RoundSpread.of(a / b for a, b in zip(ours, theirs, strict=True) if b)
            one, other = RoundSpread.of(ours), RoundSpread.of(theirs)
            assert one is not None
            assert other is not None
            rows.append((name, one, other, ratio))
        return rows


def ours(found: Figures) -> dict[str, float]:
    """Raises LaunchError where there is nothing to compare."""
    if found.ttft_s is None or found.tpot_s is None or found.itl_s is None or found.e2e_s is None:
        raise LaunchError(f"no answer of two tokens or more: {found.errors or 'give more of them (--tokens)'}")
    tokens = found.output_tokens
    return {
        "TTFT p50 ms": found.ttft_s.p50 * 1e3,
        "TTFT p99 ms": found.ttft_s.p99 * 1e3,
        "TPOT p50 ms": found.tpot_s.p50 * 1e3,
        "ITL mean ms": found.itl_s.mean * 1e3,
        "E2E p50 ms": found.e2e_s.p50 * 1e3,
        "E2E p99 ms": found.e2e_s.p99 * 1e3,
        "output tokens": 0.0 if tokens is None else tokens.mean * tokens.count,
        "requests that failed": float(found.failed),
    }


def measure_ours(
    target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], folder: Path
) -> dict[str, float]:
    load = carry_out(target, config, workload(config, prompts, Point(users=config.users[0])), folder)
    return ours(figures(load.observations, load.window))


def measure_theirs(
    target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], folder: Path, options: AgreementOptions
) -> dict[str, float]:
    """Raises LaunchError with their last words."""
    requests = config.requests or 0
    asked = itertools.islice(itertools.cycle(prompts), requests)
    folder.mkdir(parents=True)
    replace_text(folder / "prompts.jsonl", "".join(json.dumps({"prompt": p.text}) + "\n" for p in asked))
    command = [
        *(options.vllm, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai-chat"),
        *("--base-url", target.url, "--endpoint", "/v1/chat/completions"),
        *("--model", config.model, "--tokenizer", str(options.tokenizer)),
        *("--dataset-name", "custom", "--dataset-path", str(folder / "prompts.jsonl"), "--skip-chat-template"),
        *("--custom-output-len", str(config.max_tokens), "--ignore-eos", "--num-prompts", str(requests)),
        *("--max-concurrency", str(config.users[0]), "--num-warmups", str(config.users[0]), "--seed", str(config.seed)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "result.json"),
    ]
    environment = {**os.environ, "OPENAI_API_KEY": target.token, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    if done.returncode or not (folder / "result.json").exists():
        raise LaunchError(f"`vllm bench serve` failed: {(done.stderr or done.stdout).strip()[-600:]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {name: float(result[key]) for name, key in FIGURES.items()}


def compare(
    target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], options: AgreementOptions
) -> Rounds:
    found: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="hpc-router-agreement-") as scratch:
        for number in range(options.rounds):
            both = {
                "ours": lambda at: measure_ours(target, config, prompts, at),
                "theirs": lambda at: measure_theirs(target, config, prompts, at, options),
            }
            order = list(both) if number % 2 == 0 else list(reversed(both))
            found.append({name: both[name](Path(scratch) / f"{name}-{number}") for name in order})
    return Rounds(*({name: [one[who][name] for one in found] for name in FIGURES} for who in ("ours", "theirs")))


def markdown(rounds: Rounds, *, config: BenchConfig, origin: Mapping[str, Any]) -> str:
    lines = [
        f"# Load generator beside `vllm bench serve`, {origin['at']}",
        "",
        f"`{origin['command']}`: {config.users[0]} users, {config.requests} requests of {config.max_tokens} tokens, "
        f"{len(rounds.ours['E2E p50 ms'])} rounds; {origin['hardware']['cpu']}, {origin['hardware']['cpus']} CPUs; "
        f"vLLM {origin['vllm']}.",
        "",
        "| figure | ours, median (range) | theirs | ours / theirs |",
        "|---|---|---|---|",
    ]
    for name, one, other, ratio in rounds.table():
        lines.append(f"| {name} | {_shown(one)} | {_shown(other)} | {'-' if ratio is None else _shown(ratio)} |")
    return "\n".join(lines) + "\n"


def _shown(value: RoundSpread) -> str:
    return f"{value.median:.4g} ({value.low:.4g}-{value.high:.4g})"


def _version(vllm: str) -> str:
    ask = "from importlib.metadata import version; print(version('vllm'))"
    done = subprocess.run([vllm, "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"--vllm {vllm}: has no vLLM: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


def agreement(run: RunDir, options: AgreementOptions) -> str:
    """Blocks; the table, which stands in `options.out` as well. Raises ConfigError, LaunchError."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    config = read_config(
        {
            "users": [options.users],
            "requests": options.requests,
            "max_tokens": options.tokens,
            "model": options.model,
            "extra": {"ignore_eos": True},
        }
    )
    access = router_access(run)
    origin = {**origin_of(at), "vllm": _version(options.vllm)}
    found = compare(LoadTarget(access.url, access.token), config, built_in(), options)
    text = markdown(found, config=config, origin=origin)
    whole = {"schema": SCHEMA, "origin": origin, "bench": asdict(config), **asdict(found)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"agreement-{at.replace('-', '').replace(':', '')}"
    replace_text(path.with_suffix(".json"), json.dumps(whole, indent=1, allow_nan=False) + "\n", mode=0o644)
    replace_text(path.with_suffix(".md"), text, mode=0o644)
    return f"{text}\n{path}.json, .md"
