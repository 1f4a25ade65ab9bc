"""`hpc-router plan --users` predicts what the load generator then measures on simulated engines, router and agents.

The engines are slowed down, so that a busy machine changes their latencies little. The benchmark divides its times by
that factor.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_router.bench.conversations import draw_length
from hpc_router.bench.load.native.build import compiler
from hpc_router.bench.what_if.demand import spread_around
from tests.e2e.deployment import cli, deployed
from tests.support.needs import ROOT, need

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SLOWDOWN, THINK_S = 4, 0.5
PROMPT, ANSWER = 400, 16
USERS = (12, 40, 120)
"""Light load, near saturation, saturated: the engines compute 32 requests at once."""
TOLERANCE = 0.15
CONF = ROOT / "tests" / "e2e" / "conf"


def write_prompts(path: Path) -> None:
    """Prompts of random words, so that no prefix cache helps."""
    source, lengths = random.Random(5), spread_around(PROMPT, 0.5)
    words = [f"word{number}" for number in range(5000)]
    with path.open("w") as file:
        for _ in range(4000):
            text = " ".join(source.choices(words, k=draw_length(source, lengths)))
            file.write(json.dumps({"prompt": text}) + "\n")


@pytest.mark.timeout(900)
def test_throughput_and_median_first_token_are_as_predicted(tmp_path: Path) -> None:
    need(compiler() is not None, "a C compiler (gcc)")
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "results"
    write_prompts(prompts)
    answers = spread_around(ANSWER, 0.5)
    with deployed(tmp_path, "--config-dir", str(CONF), "topology=what_if") as one:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "launch.bench", f"run={one.run}", f"bench.users={list(USERS)}"),
                *(f"bench.prompts={prompts}", f"bench.think_s={THINK_S * SLOWDOWN}", "bench.extra={ignore_eos: true}"),
                f"bench.output_tokens={{kind: lognormal, mean: {ANSWER}, sigma: 0.5, low: {answers.low}, "
                f"high: {answers.high}}}",
                *("bench.warmup_s=15", "bench.duration_s=45", f"bench.output={results}"),
            ],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    measured = {
        r["users"]: r for path in results.glob("*.json*") for r in map(json.loads, path.read_text().splitlines())
    }
    lines, worst = [], 0.0
    for users in USERS:
        predicted = json.loads(cli(
            "plan", "--users", str(users), "--think", f"{THINK_S}s", "--for", "10m", "--prompt-tokens", str(PROMPT),
            "--answer-tokens", str(ANSWER), "--config-dir", str(CONF), "topology=what_if", "--json",
        ).stdout)["deployments"][0]["total"]  # fmt: skip
        found = measured[users]
        for name, real, expected in (
            ("tokens/s", found["tokens_per_s"], predicted["tokens_per_s"]),
            ("requests/s", found["requests_per_s"], predicted["requests_per_s"]),
            ("median TTFT s", found["ttft_s"]["p50"], predicted["ttft_s"]["p50"]),
        ):
            error = expected / real - 1
            worst = max(worst, abs(error))
            lines.append(f"{users} users: {name} measured {real:.4g}, predicted {expected:.4g} ({error:+.1%})")
    print("\n".join(lines))
    assert worst <= TOLERANCE, "\n".join([*lines, *(str(r["invalid"]) for r in measured.values())])
