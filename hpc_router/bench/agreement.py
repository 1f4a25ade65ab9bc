"""`hpc-router bench agreement`: compares this package's load generator with `vllm bench serve` on one deployment.

Both tools send the same prompts with the same number of users, one tool after the other. Their order alternates from
round to round. docs/bench.md lists the differences between their definitions. In this module "ours" is this package's
load generator, and "theirs" is `vllm bench serve`.
"""

import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.config import BenchConfig, read_config
from hpc_router.bench.figures import Figures, figures
from hpc_router.bench.load.generator import LoadTarget, run_load
from hpc_router.bench.output import stem_of, utc_now, write_results
from hpc_router.bench.prompts import BenchPrompt, built_in
from hpc_router.bench.provenance import origin_of
from hpc_router.bench.relay_cost.statistics import RoundSpread
from hpc_router.bench.workload import Point, workload
from hpc_router.cluster.commands.router_access import router_access
from hpc_router.errors import LaunchError
from hpc_router.state.atomic_files import replace_text
from hpc_router.state.run_directory import RunDir

SCHEMA: Final = 1
TOOL_TIMEOUT_S: Final = 900.0
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
"""The compared figures and their keys in the result of `vllm bench serve`. Rates are not compared, because `vllm bench
serve` includes the start and the end of the load and this load generator does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementOptions:
    """The options of the comparison of this package's load generator with `vllm bench serve`. `vllm`: Python
    interpreter with vLLM. `tokenizer`: any model folder, because `vllm bench serve` requires one. `requests`: number of
    measured requests per tool and round."""

    vllm: str
    tokenizer: Path
    out: Path
    model: str = "auto"
    users: int = 8
    requests: int = 200
    tokens: int = 32
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class AgreementRounds:
    """The figures of all rounds, each as name -> values, one per round. `ours`: from this package's load generator;
    `theirs`: from `vllm bench serve`."""

    ours: Mapping[str, Sequence[float]]
    theirs: Mapping[str, Sequence[float]]

    def table(self) -> list[tuple[str, RoundSpread, RoundSpread, RoundSpread | None]]:
        """Returns one row per figure: its name, then over all rounds the spread of the values in `ours`, of those in
        `theirs`, and of their ratio in each round (None if `theirs` is 0 in every round)."""
        rows = []
        for name in FIGURES:
            ours, theirs = self.ours[name], self.theirs[name]
            ratio = RoundSpread.of(a / b for a, b in zip(ours, theirs, strict=True) if b)
            one, other = RoundSpread.of(ours), RoundSpread.of(theirs)
            assert one is not None
            assert other is not None
            rows.append((name, one, other, ratio))
        return rows


def comparable(found: Figures) -> dict[str, float]:
    """Returns the figures in `found` that `vllm bench serve` reports as well. Raises LaunchError if one is missing."""
    if found.ttft_s is None or found.tpot_s is None or found.itl_s is None or found.e2e_s is None:
        raise LaunchError(f"no response has two tokens or more: {found.errors or 'raise --tokens'}")
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
    """Runs this package's load generator and returns those of its figures that `vllm bench serve` reports as well."""
    load = run_load(target, config, workload(config, prompts, Point(users=config.users[0])), folder)
    return comparable(figures(load.observations, load.window))


def measure_theirs(
    target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], folder: Path, options: AgreementOptions
) -> dict[str, float]:
    """Runs `vllm bench serve` and returns its figures by the names of `comparable`. If it fails, raises LaunchError
    with the end of its stderr."""
    requests = config.requests or 0
    sent = itertools.islice(itertools.cycle(prompts), requests)
    folder.mkdir(parents=True)
    replace_text(folder / "prompts.jsonl", "".join(json.dumps({"prompt": p.text}) + "\n" for p in sent))
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
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=TOOL_TIMEOUT_S
    )
    if done.returncode or not (folder / "result.json").exists():
        raise LaunchError(f"`vllm bench serve` failed: {(done.stderr or done.stdout).strip()[-600:]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {name: float(result[key]) for name, key in FIGURES.items()}


def compare(
    target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], options: AgreementOptions
) -> AgreementRounds:
    """Runs this package's load generator and `vllm bench serve` in every round, and returns their figures."""
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="hpc-router-agreement-") as scratch:
        for number in range(options.rounds):
            both = {
                "ours": lambda at: measure_ours(target, config, prompts, at),
                "theirs": lambda at: measure_theirs(target, config, prompts, at, options),
            }
            order = list(both) if number % 2 == 0 else list(reversed(both))
            rounds.append({name: both[name](Path(scratch) / f"{name}-{number}") for name in order})
    return AgreementRounds(
        *({name: [one[tool][name] for one in rounds] for name in FIGURES} for tool in ("ours", "theirs"))
    )


def markdown(rounds: AgreementRounds, *, config: BenchConfig, origin: Mapping[str, Any]) -> str:
    """Formats the comparison as Markdown. `origin`: provenance as JSON."""
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
        lines.append(f"| {name} | {_format(one)} | {_format(other)} | {'-' if ratio is None else _format(ratio)} |")
    return "\n".join(lines) + "\n"


def _format(value: RoundSpread) -> str:
    return f"{value.median:.4g} ({value.low:.4g}-{value.high:.4g})"


def _version(vllm: str) -> str:
    program = "from importlib.metadata import version; print(version('vllm'))"
    done = subprocess.run([vllm, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"--vllm {vllm}: this interpreter has no vLLM: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


def agreement(run: RunDir, options: AgreementOptions) -> str:
    """Compares the two load generators on the deployment of `run`, and writes a JSON and a Markdown file to the folder
    `options.out`. Returns the Markdown text and the files' paths, as one text. Raises ConfigError and LaunchError."""
    at = utc_now()
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
    value = {"schema": SCHEMA, "origin": origin, "bench": asdict(config), **asdict(found)}
    path = write_results(options.out, stem_of("agreement", at), value, {"md": text})
    return f"{text}\n{path}.json, .md"
