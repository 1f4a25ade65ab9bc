"""Prints as JSON how many tokens vLLM's own cache manager finds for each request of the trace: `PYTHON FILE BLOCKS`.

Run by vLLM's interpreter. It starts no engine and loads no model; the answers are random tokens.
"""

import json
import random
import sys

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from tests.support.prefix_trace import ANSWER_TOKENS, replay

BLOCK = 16
IDS = 300


def main(blocks: int) -> list[int]:
    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    manager = KVCacheManager(config, max_model_len=2048, scheduler_block_size=BLOCK, hash_block_size=BLOCK)
    hasher, source = get_request_block_hasher(BLOCK, sha256), random.Random(1)
    cached: list[int] = []

    def ask(prompt: list[int]) -> list[int]:
        """Takes the steps of vLLM's scheduler for one request that runs alone."""
        name, sampling = str(len(cached)), SamplingParams(max_tokens=ANSWER_TOKENS)
        request = Request(name, prompt, sampling, None, block_hasher=hasher)
        found, tokens, _ = manager.get_computed_blocks(request)
        cached.append(tokens)
        assert manager.allocate_slots(request, len(prompt) - tokens, tokens, found) is not None
        request.num_computed_tokens = len(prompt)
        answer = [source.randrange(IDS) for _ in range(ANSWER_TOKENS)]
        for token in answer[:-1]:
            request.append_output_token_ids(token)
            assert manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1
        manager.free(request)
        return answer

    replay(ask, int, ids=IDS)
    return cached


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
