"""A program that evaluates a deployment, unmodified: lm-eval. Nothing is fetched from a hub."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from tests.clients.endpoint import Endpoint, program
from tests.support.needs import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.long]

TASKS = ROOT / "tests/clients/tasks"


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
