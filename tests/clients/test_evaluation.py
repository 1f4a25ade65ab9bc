"""Programs that evaluate and load a deployment, unmodified: lm-eval and guidellm. Nothing is fetched from a hub."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from launch import tiny_model
from tests.clients.endpoint import Endpoint, program
from tests.support.needs import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.long]

TASKS = ROOT / "tests/clients/tasks"
REQUESTS = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, endpoint: Endpoint) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    endpoint.run([program("clients", "python"), tiny_model.__file__, str(folder)], {})
    return folder


def evaluated(endpoint: Endpoint, out: Path, kind: str, options: str, *more: str) -> dict[str, Any]:
    """Task -> its results."""
    endpoint.run(
        [program("clients", "lm-eval"), "run", "--model", kind, "--model_args", f"model=math,{options}",
         "--include_path", str(TASKS), "--output_path", str(out), *more],
        {"OPENAI_API_KEY": endpoint.one.token, "HF_HOME": str(out / "hf")},
    )  # fmt: skip
    (results,) = out.glob("math/results_*.json")
    value: dict[str, Any] = json.loads(results.read_text())["results"]
    return value


def test_lm_eval_reads_the_engines_log_probabilities(endpoint: Endpoint, tokenizer: Path, tmp_path: Path) -> None:
    options = f"base_url={endpoint.url}/v1/completions,tokenizer={tokenizer}"
    results = evaluated(
        endpoint, tmp_path, "local-completions", options, "--tasks", "facts_choice,facts_open", "--log_samples"
    )
    assert results["facts_choice"]["sample_len"] == results["facts_open"]["sample_len"] == 3
    (samples,) = tmp_path.glob("math/samples_facts_choice_*.jsonl")
    resps = [resp for line in samples.read_text().splitlines() for resp in json.loads(line)["filtered_resps"]]
    assert len(resps) == 9
    sums = continuations(endpoint)
    for logprob, greedy in resps:
        assert any(float(logprob) == pytest.approx(one) for one in sums), (logprob, sums)
        assert greedy in (True, "True"), "the simulated engine ranks every token first"


def continuations(endpoint: Endpoint) -> list[float]:
    """The engine's log probability of every ending of every prompt that lm-eval sent with `echo`, asked once more."""
    sums: list[float] = []
    with endpoint.one.client() as client:
        for body in endpoint.received("math"):
            if body.get("echo"):
                logprobs = client.completions.create(**body).choices[0].logprobs
                assert logprobs
                assert logprobs.token_logprobs
                (prompt,) = body["prompt"]
                sums += accumulate(value or 0.0 for value in reversed(logprobs.token_logprobs[: len(prompt)]))
    return sums


def test_lm_eval_chats(endpoint: Endpoint, tmp_path: Path) -> None:
    options = f"base_url={endpoint.url}/v1/chat/completions"
    results = evaluated(
        endpoint, tmp_path, "local-chat-completions", options, "--tasks", "facts_open", "--apply_chat_template"
    )
    assert results["facts_open"]["sample_len"] == 3


def test_guidellm(endpoint: Endpoint, tokenizer: Path, tmp_path: Path) -> None:
    """The token is in a file that only its owner can read: an argument would show in `ps`."""
    scenario, report = tmp_path / "scenario.json", tmp_path / "report.json"
    backend = {"kind": "openai_http", "target": f"{endpoint.url}/v1", "model": "math", "api_key": endpoint.one.token}
    spec = {
        "backend": backend,
        "profile": {"kind": "concurrent", "streams": 2},
        "constraints": [{"kind": "max_requests", "count": REQUESTS}],
        "data": [{"kind": "synthetic_text", "prompt_tokens": 16, "output_tokens": 8}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(tokenizer)},
    }
    scenario.touch(mode=0o600)
    scenario.write_text(json.dumps({"spec": spec}))
    endpoint.run(
        [program("clients", "guidellm"), "run", "--config", str(scenario), "--output", f"kind=json,path={report}",
         "--disable-console"],
        {},
    )  # fmt: skip
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    assert benchmark["metrics"]["request_totals"] == totals
    assert endpoint.one.token not in report.read_text()
