"""The prefix cache of a running simulated engine finds as many tokens as that of a running vLLM: one trace of
conversations, sent to both over HTTP with the same number of blocks, compared by both engines' own counters."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hpc_router.net.addresses import free_port
from hpc_router.net.http_client import Unreachable, call_blocking
from launch import tiny_model
from tests.support.needs import ROOT, engine_python
from tests.support.prefix_trace import ANSWER_TOKENS, replay
from tests.support.waiting import eventually_sync

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.long]

BLOCKS = 80
"""So few that conversations are evicted between two of their turns."""
BLOCK = 32
"""vLLM on a CPU takes multiples of 32 only."""
IDS = 300
START_S = 300.0
ANSWER = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0}


@contextmanager
def server(argv: Sequence[str | Path], *, port: int, log: Path, **environment: str) -> Iterator[str]:
    """Starts an engine, waits until it answers, and ends it with the block."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*map(str, argv), "--port", str(port)], stdout=stream, stderr=stream, cwd=ROOT,
            env={**os.environ, **environment},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-12000:]
        try:
            return call_blocking("GET", f"{url}/health").status == 200
        except Unreachable:
            return False

    try:
        eventually_sync(answers, within_s=START_S)
        yield url
    finally:
        process.terminate()
        process.wait()


def completion(url: str, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = call_blocking(
        "POST", f"{url}/v1/completions", body={"model": "m", "prompt": prompt, **ANSWER, **fields}, timeout_s=60
    )
    assert response.status == 200, response.message
    choice: dict[str, Any] = response.body["choices"][0]
    return choice


def counted(url: str) -> tuple[float, float]:
    """The tokens that were looked up and that were found."""
    text = str(call_blocking("GET", f"{url}/metrics").body)

    def total(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{name}_total{{.*}} (\S+)$", text, re.MULTILINE))

    return total("vllm:prefix_cache_queries"), total("vllm:prefix_cache_hits")


def of_vllm(folder: Path) -> tuple[float, float]:
    python, model = engine_python("vllm"), folder / "m"
    subprocess.run([engine_python("transformers"), tiny_model.__file__, "m"], cwd=folder, check=True)
    argv: list[str | Path] = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "m"),
        *("--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager", "--host", "127.0.0.1"),
        *("--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS), "--enable-prefix-caching"),
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CACHE_ROOT": str(ROOT / ".venv-vllm" / "cache"),
    }  # fmt: skip
    with server(argv, port=free_port(), log=folder / "vllm.log", **environment) as url:

        def ask(prompt: list[int]) -> list[int]:
            tokens: list[int] = completion(url, prompt, return_token_ids=True)["token_ids"]
            return tokens

        return replayed(url, ask, lambda number: number)


def of_simulated(folder: Path) -> tuple[float, float]:
    argv = [
        *(sys.executable, "-m", "hpc_router.sim", "--served-model-name", "m", "--ttft-ms", "0", "--itl-ms", "0"),
        *("--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS)),
    ]
    with server(argv, port=free_port(), log=folder / "sim.log") as url:

        def ask(prompt: list[str]) -> list[str]:
            return str(completion(url, " ".join(prompt))["text"]).split()

        return replayed(url, ask, lambda number: f"w{number}")


def replayed(url: str, ask: Callable[[list[Any]], list[Any]], token: Callable[[int], Any]) -> tuple[float, float]:
    before = counted(url)

    def checked(prompt: list[Any]) -> list[Any]:
        answer = ask(prompt)
        assert len(answer) == ANSWER_TOKENS
        return answer

    replay(checked, token, ids=IDS)
    after = counted(url)
    return after[0] - before[0], after[1] - before[1]


def test_hit_tokens_are_those_of_a_running_vllm(tmp_path: Path) -> None:
    queries, hits = of_simulated(tmp_path)
    real_queries, real_hits = of_vllm(tmp_path)
    print(f"simulated: {hits:.0f} of {queries:.0f} tokens, vLLM: {real_hits:.0f} of {real_queries:.0f}")
    assert queries == real_queries
    assert hits == pytest.approx(real_hits, rel=0.05)
    assert 0.2 * queries < hits < 0.9 * queries, "some of the trace is found, some evicted or new"
