"""Three load tools on one deployment: `launch.bench`, `vllm bench serve` and guidellm, each with its own command line.

They send the same prompts with the same load, and their figures get the same names. No tool gets the token as an
argument, because arguments show in `ps`.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.state.atomic_files import replace_text
from tests.clients.endpoint import Endpoint, program
from tests.support.needs import engine_python


@dataclass(frozen=True, kw_only=True)
class Load:
    """A closed loop of `users`, or an open loop of `rate` requests per second at random times. Each prompt is sent
    once, and each answer has `tokens` tokens. The open loop of `launch.bench` lasts as long as that takes on average,
    and sends as many prompts as fall into that time."""

    prompts: Sequence[str]
    tokens: int
    model: str = "steady"
    users: int | None = None
    rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class ToolFigures:
    """What a tool reports, in its own definitions. `tpot_ms`: what it calls time per output token. `gaps`: number of
    times between two events that its inter-token latency counts."""

    succeeded: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    gaps: int
    requests_per_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    tpot_p50_ms: float
    itl_mean_ms: float
    e2e_p50_ms: float


def launch_bench(endpoint: Endpoint, load: Load, folder: Path, _tokenizer: Path) -> ToolFigures:
    prompts = _prompts(folder, [{"prompt": text} for text in load.prompts])
    count = len(load.prompts)
    if load.rate is None:
        shape = [f"bench.users=[{load.users}]", f"bench.requests={count}"]
    else:
        shape = [f"bench.rates=[{load.rate}]", f"bench.duration_s={count / load.rate}"]
    endpoint.run(
        [sys.executable, "-m", "launch.bench", f"run={endpoint.one.run}", *shape, f"bench.model={load.model}",
         f"bench.max_tokens={load.tokens}", "bench.extra={ignore_eos: true}",
         f"bench.prompts={prompts}", f"bench.output={folder}", "bench.raw=true"],
        {},
    )  # fmt: skip
    (requests_file,) = folder.glob("bench-*.requests.jsonl")
    requests = [json.loads(line) for line in requests_file.read_text().splitlines()]
    measured = [one for one in requests if one["part"] == "measured"]
    found = json.loads(requests_file.with_name(requests_file.name.replace(".requests", "")).read_text())
    return ToolFigures(
        succeeded=found["succeeded"],
        failed=found["failed"],
        prompt_tokens=sum(one["prompt_tokens"] for one in measured),
        output_tokens=sum(one["tokens"] for one in measured),
        gaps=sum(len(one["content_s"]) - 1 for one in measured),
        requests_per_s=found["requests_per_s"],
        tokens_per_s=found["tokens_per_s"],
        ttft_p50_ms=found["ttft_s"]["p50"] * 1e3,
        tpot_p50_ms=found["tpot_s"]["p50"] * 1e3,
        itl_mean_ms=found["itl_s"]["mean"] * 1e3,
        e2e_p50_ms=found["e2e_s"]["p50"] * 1e3,
    )


def vllm_bench(endpoint: Endpoint, load: Load, folder: Path, tokenizer: Path) -> ToolFigures:
    prompts = _prompts(folder, [{"prompt": text} for text in load.prompts])
    shape = ("--max-concurrency", load.users) if load.rate is None else ("--request-rate", load.rate)
    endpoint.run(
        [str(engine_python("vllm")), "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai-chat",
         "--base-url", endpoint.url, "--endpoint", "/v1/chat/completions", "--model", load.model,
         "--tokenizer", str(tokenizer), "--dataset-name", "custom", "--dataset-path", str(prompts),
         "--skip-chat-template", "--disable-shuffle", "--custom-output-len", str(load.tokens), "--ignore-eos",
         "--num-prompts", str(len(load.prompts)), *map(str, shape), "--percentile-metrics", "ttft,tpot,itl,e2el",
         "--disable-tqdm", "--save-result", "--save-detailed", "--result-dir", str(folder),
         "--result-filename", "result.json"],
        {"OPENAI_API_KEY": endpoint.one.token},
    )  # fmt: skip
    found = json.loads((folder / "result.json").read_text())
    return ToolFigures(
        succeeded=found["completed"],
        failed=found["failed"],
        prompt_tokens=found["total_input_tokens"],
        output_tokens=found["total_output_tokens"],
        gaps=sum(map(len, found["itls"])),
        requests_per_s=found["request_throughput"],
        tokens_per_s=found["output_throughput"],
        ttft_p50_ms=found["median_ttft_ms"],
        tpot_p50_ms=found["median_tpot_ms"],
        itl_mean_ms=found["mean_itl_ms"],
        e2e_p50_ms=found["median_e2el_ms"],
    )


def guidellm(endpoint: Endpoint, load: Load, folder: Path, tokenizer: Path) -> ToolFigures:
    """The token is in a file that only its owner can read."""
    rows = [{"prompt": text, "output_tokens_count": load.tokens} for text in load.prompts]
    closed = {"kind": "concurrent", "streams": load.users}
    spec = {
        "backend": {
            "kind": "openai_http", "target": f"{endpoint.url}/v1", "model": load.model, "api_key": endpoint.one.token,
        },
        "profile": closed if load.rate is None else {"kind": "poisson", "rate": load.rate},
        "constraints": [{"kind": "max_requests", "count": len(load.prompts)}],
        "data": [{"kind": "json_file", "path": str(_prompts(folder, rows))}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(tokenizer)},
    }  # fmt: skip
    scenario, report = folder / "scenario.json", folder / "report.json"
    replace_text(scenario, json.dumps({"spec": spec}), mode=0o600)
    endpoint.run(
        [program("clients", "guidellm"), "run", "--config", str(scenario), "--output", f"kind=json,path={report}",
         "--disable-console"],
        {},
    )  # fmt: skip
    scenario.unlink()
    text = report.read_text()
    assert endpoint.one.token not in text
    (found,) = json.loads(text)["benchmarks"]
    metrics, answers = found["metrics"], found["requests"]["successful"]

    def figure(name: str, statistic: str) -> float:
        return float(metrics[name]["successful"][statistic])

    return ToolFigures(
        succeeded=metrics["request_totals"]["successful"],
        failed=metrics["request_totals"]["errored"] + metrics["request_totals"]["incomplete"],
        prompt_tokens=sum(one["prompt_tokens"] for one in answers),
        output_tokens=sum(one["output_tokens"] for one in answers),
        gaps=sum(one["info"]["timings"]["token_iterations"] - 1 for one in answers),
        requests_per_s=figure("requests_per_second", "mean"),
        tokens_per_s=figure("output_tokens_per_second", "mean"),
        ttft_p50_ms=figure("time_to_first_token_ms", "median"),
        tpot_p50_ms=figure("time_per_output_token_ms", "median"),
        itl_mean_ms=figure("inter_token_latency_ms", "mean"),
        e2e_p50_ms=figure("request_latency", "median") * 1e3,
    )


TOOLS: Final[Mapping[str, Callable[[Endpoint, Load, Path, Path], ToolFigures]]] = {
    "launch.bench": launch_bench,
    "vllm bench serve": vllm_bench,
    "guidellm": guidellm,
}


def measure(name: str, endpoint: Endpoint, load: Load, folder: Path, tokenizer: Path) -> ToolFigures:
    """Runs a tool of `TOOLS`. `folder`: a new folder for its files. `tokenizer`: a model's folder; the simulated
    engines count words, so no figure depends on it."""
    folder.mkdir(parents=True)
    return TOOLS[name](endpoint, load, folder, tokenizer)


def _prompts(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
