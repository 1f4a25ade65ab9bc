"""The simulated engine finds in its cache what the cache manager of the installed vLLM finds, request by request."""

import json
import os
import subprocess

import pytest

from hpc_router.sim.kv_cache import BlockPool, SequenceBlocks, block_hashes
from hpc_router.sim.roofline import BLOCK
from tests.support.needs import ROOT, engine_python
from tests.support.prefix_trace import ANSWER_TOKENS, replay

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]


def simulated(blocks: int) -> list[int]:
    """Returns the number of cached tokens of each request; vLLM's first block is a placeholder."""
    pool, cached = BlockPool(blocks - 1), list[int]()

    def ask(prompt: list[str]) -> list[str]:
        answer = [f"{len(cached)}.{number}" for number in range(ANSWER_TOKENS)]
        one = SequenceBlocks(pool, block_hashes([*prompt, *answer], block_size=BLOCK, seed=None))
        cached.append(one.begin(len(prompt), one.find(len(prompt))))
        for tokens in range(len(prompt), len(prompt) + ANSWER_TOKENS):
            one.grow(tokens)
        one.release()
        return answer

    replay(ask, str, ids=300)
    return cached


def test_the_same_tokens_are_found_for_every_request() -> None:
    """With a cache that must evict, and with one that holds everything."""
    found = {}
    for blocks in (160, 4000):
        done = subprocess.run(
            [engine_python("vllm"), "-m", "tests.support.vllm_kv_cache", str(blocks)],
            cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        found[blocks] = json.loads(done.stdout.splitlines()[-1])
        assert simulated(blocks) == found[blocks]
    assert sum(found[160]) < 0.9 * sum(found[4000])
