"""The prefix cache: what vLLM 0.32 finds again, and when."""

import asyncio
from collections.abc import Sequence

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.config.schema import Roofline
from hpc_router.sim.config import SimConfig
from hpc_router.sim.continuous_batching import Batch
from hpc_router.sim.kv_cache import BlockPool, SequenceBlocks, block_hashes
from hpc_router.sim.roofline import BLOCK
from tests.sim.calls import INSTANT, JsonObject, at, chat, decoded, post, stream
from tests.sim.support import Start

LONG = " ".join(f"word{number}" for number in range(40))


def hashes(*tokens: str, seed: object = None) -> list[int]:
    return block_hashes(tokens, block_size=2, seed=seed)


def sequence(pool: BlockPool, text: str) -> SequenceBlocks:
    return SequenceBlocks(pool, block_hashes(text.split(), block_size=pool.block_size, seed=None))


def computed(pool: BlockPool, text: str) -> SequenceBlocks:
    """Returns a sequence whose tokens are all in blocks."""
    one, tokens = sequence(pool, text), len(text.split())
    one.begin(tokens, one.find(tokens))
    one.grow(tokens)
    return one


def test_a_hash_covers_everything_before_its_block_and_full_blocks_only() -> None:
    assert hashes("a", "b", "c") == hashes("a", "b", "d")
    assert len(hashes("a", "b", "c")) == 1
    first, second = hashes("a", "b", "c", "d"), hashes("x", "b", "c", "d")
    assert first[1] != second[1]
    assert hashes("a", "b", seed="adapter") != hashes("a", "b")


def test_the_last_token_is_computed_and_with_it_its_whole_block() -> None:
    pool = BlockPool(8, block_size=2)
    computed(pool, "a b c d").release()
    assert len(sequence(pool, "a b c d").find(4)) == 1
    assert len(sequence(pool, "a b c d e").find(5)) == 2


def test_a_partial_block_is_not_found() -> None:
    pool = BlockPool(8, block_size=2)
    computed(pool, "a b c").release()
    assert len(sequence(pool, "a b c d e").find(5)) == 1


def test_running_sequences_share_blocks() -> None:
    pool = BlockPool(8, block_size=2)
    first = computed(pool, "a b c d e")
    second = computed(pool, "a b c d x")
    assert second.cached_tokens == 4
    assert pool.used == 4
    first.release()
    assert pool.used == 3
    second.release()
    assert (pool.used, pool.free) == (0, 8)
    assert (pool.queries, pool.hits) == (10, 4)


def test_the_least_recently_used_prefix_is_evicted_from_its_end() -> None:
    pool = BlockPool(6, block_size=2)
    old = computed(pool, "a b c d")
    new = computed(pool, "e f g h")
    old.release()
    new.release()
    computed(pool, "p q r s t u").release()
    assert [len(sequence(pool, text).find(5)) for text in ("a b c d x", "e f g h x", "p q r s x")] == [1, 2, 2]


def test_use_protects_from_eviction() -> None:
    pool = BlockPool(4, block_size=2)
    old = computed(pool, "a b c d")
    computed(pool, "e f g h").release()
    old.release()
    again = computed(pool, "a b c d x y")
    assert again.cached_tokens == 4
    assert [len(sequence(pool, text).find(5)) for text in ("a b c d x", "e f g h x")] == [2, 1]


def test_a_block_computed_twice_survives_the_eviction_of_one_copy() -> None:
    pool = BlockPool(3, block_size=2)
    first, second = computed(pool, "a b"), computed(pool, "a b")
    first.release()
    third = computed(pool, "c d e f")
    assert len(sequence(pool, "a b x").find(3)) == 1
    second.release()
    third.release()


def test_without_caching_nothing_is_found_or_counted() -> None:
    pool = BlockPool(8, block_size=2, caching=False)
    computed(pool, "a b c d").release()
    assert sequence(pool, "a b c d e").find(5) == []
    assert (pool.queries, pool.free) == (0, 8)


def test_a_batch_computes_only_what_is_not_cached() -> None:
    batch = Batch(BlockPool(64), max_seqs=8, max_tokens=1024)
    prompt = [f"w{number}" for number in range(100)]
    keys = block_hashes(prompt, block_size=BLOCK, seed=None)
    first, second = batch.add(100, keys), batch.add(100, keys)
    assert [(step.new, step.context) for step in batch.plan()] == [(100, 0), (4, 96)]
    assert batch.finish() == [first, second]
    assert (first.blocks.cached_tokens, second.blocks.cached_tokens) == (0, 96)


def test_a_preempted_sequence_finds_its_own_blocks_and_counts_one_query() -> None:
    pool = BlockPool(4)
    batch = Batch(pool, max_seqs=8, max_tokens=256)
    first = batch.add(BLOCK)
    second = batch.add(2 * BLOCK, block_hashes([f"w{n}" for n in range(40)], block_size=BLOCK, seed=None))
    batch.plan()
    batch.finish()
    batch.plan()
    assert (batch.preempted, list(batch.waiting)) == (1, [second])
    batch.finish()
    batch.remove(first)
    assert [(step.new, step.context) for step in batch.plan()] == [(1, 2 * BLOCK)]
    assert (pool.queries, pool.hits, second.blocks.cached_tokens) == (3 * BLOCK, 0, 0)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=20),
    blocks=st.integers(8, 20),
    ends=st.lists(st.integers(0, 5), min_size=20, max_size=20),
)
def test_no_block_is_lost_or_used_twice(prompts: Sequence[str], blocks: int, ends: Sequence[int]) -> None:
    pool = BlockPool(blocks, block_size=2)
    open_: list[SequenceBlocks] = []
    for text, end in zip(prompts, ends, strict=False):
        open_.append(computed(pool, " ".join(text)))
        if len(open_) > end:
            open_.pop(0).release()
        assert pool.free + pool.used == blocks
        assert pool.hits <= pool.queries
    for one in open_:
        one.release()
    assert pool.free == blocks


async def usage_of(session: aiohttp.ClientSession, prompt: str, **more: object) -> object:
    status, body = await post(session, "/v1/chat/completions", chat(prompt, **more))
    assert status == 200
    return body["usage"]


async def metric(session: aiohttp.ClientSession, name: str) -> float:
    text = await (await session.get("/metrics")).text()
    [line] = [line for line in text.splitlines() if line.startswith(f"vllm:{name}{{")]
    return float(line.rpartition(" ")[2])


DETAILS = SimConfig(ttft_s=0.0, itl_s=0.0, jitter=0.0, enable_prompt_tokens_details=True)


async def test_usage_and_metrics_name_the_cached_tokens(start: Start) -> None:
    _, session = await start(DETAILS)
    first = await usage_of(session, LONG, max_tokens=4)
    again = await usage_of(session, LONG, max_tokens=4)
    assert at(first, "prompt_tokens_details") == {"cached_tokens": 0}
    assert at(again, "prompt_tokens_details") == {"cached_tokens": 32}
    streamed = await stream(session, chat(LONG, max_tokens=4, stream=True, stream_options={"include_usage": True}))
    assert at(decoded(streamed[-2]), "usage", "prompt_tokens_details") == {"cached_tokens": 32}
    assert await metric(session, "prefix_cache_queries_total") == 120
    assert await metric(session, "prefix_cache_hits_total") == 64
    assert await metric(session, "prompt_tokens_cached_total") == 64
    assert await metric(session, "kv_cache_usage_perc") == 0


async def test_usage_names_them_only_where_the_engine_is_told_to(start: Start) -> None:
    _, session = await start(INSTANT)
    await usage_of(session, LONG)
    assert "prompt_tokens_details" not in at(await usage_of(session, LONG))  # type: ignore[operator]
    status, response = await post(session, "/v1/responses", {"model": "sim", "input": LONG})
    assert (status, at(response, "usage", "input_tokens_details", "cached_tokens")) == (200, 32)


async def test_a_message_counts_cached_tokens_apart(start: Start) -> None:
    _, session = await start(DETAILS)
    body: JsonObject = {"model": "sim", "max_tokens": 4, "messages": [{"role": "user", "content": LONG}]}
    usages = [at((await post(session, "/v1/messages", body))[1], "usage") for _ in range(2)]
    assert usages == [
        {"input_tokens": 40, "cache_read_input_tokens": 0, "output_tokens": 4},
        {"input_tokens": 8, "cache_read_input_tokens": 32, "output_tokens": 4},
    ]


async def test_the_next_turn_finds_prompt_and_answer(start: Start) -> None:
    _, session = await start(DETAILS)
    asked: JsonObject = {"role": "user", "content": LONG}
    _, body = await post(session, "/v1/chat/completions", chat(LONG, max_tokens=25, ignore_eos=True))
    said = at(body, "choices", 0, "message", "content")
    messages = [asked, {"role": "assistant", "content": said}, {"role": "user", "content": "and then"}]
    _, then = await post(session, "/v1/chat/completions", {"model": "sim", "messages": messages})
    # 40 + 25 tokens, of which the last was not in the cache, are four full blocks.
    assert at(then, "usage", "prompt_tokens_details", "cached_tokens") == 64


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"model": "sim"}, {"model": "law"}),
        ({"cache_salt": "a"}, {"cache_salt": "b"}),
        ({}, {"logprobs": True, "prompt_logprobs": 1}),
    ],
    ids=["adapter", "salt", "prompt log probabilities"],
)
async def test_what_never_shares_a_prefix(start: Start, first: JsonObject, second: JsonObject) -> None:
    config = SimConfig(ttft_s=0.0, itl_s=0.0, adapters=("law",), enable_prompt_tokens_details=True)
    _, session = await start(config)
    await usage_of(session, LONG, **first)
    assert at(await usage_of(session, LONG, **second), "prompt_tokens_details", "cached_tokens") == 0


async def test_an_empty_salt_is_refused_as_in_vllm(start: Start) -> None:
    _, session = await start(INSTANT)
    status, body = await post(session, "/v1/chat/completions", chat(cache_salt=""))
    assert (status, at(body, "error", "param")) == (400, "cache_salt")


async def test_it_can_be_turned_off(start: Start) -> None:
    config = SimConfig(ttft_s=0.0, itl_s=0.0, enable_prefix_caching=False, enable_prompt_tokens_details=True)
    _, session = await start(config)
    await usage_of(session, LONG)
    assert at(await usage_of(session, LONG), "prompt_tokens_details", "cached_tokens") == 0
    text = await (await session.get("/metrics")).text()
    assert 'enable_prefix_caching="False"' in text
    assert await metric(session, "prefix_cache_queries_total") == 0


async def test_a_small_cache_forgets(start: Start) -> None:
    config = SimConfig(ttft_s=0.0, itl_s=0.0, num_gpu_blocks_override=5, enable_prompt_tokens_details=True)
    _, session = await start(config)
    other = LONG.replace("word", "other")
    cached = [at(await usage_of(session, text, max_tokens=1), "prompt_tokens_details", "cached_tokens")
              for text in (LONG, other, other, LONG)]  # fmt: skip
    # Four blocks: the second prompt leaves one of the two full blocks of the first.
    assert cached == [0, 0, 32, 16]


async def test_a_cached_prompt_shortens_the_time_to_the_first_token_of_a_predicted_engine(start: Start) -> None:
    """The steps' predicted seconds are compared, so the machine's speed does not matter."""
    config = SimConfig(roofline=Roofline())
    engine, session = await start(config)
    batch = engine._context.batch
    assert batch is not None
    prompt = " ".join(f"w{number}" for number in range(8000))
    seconds = []
    for _ in range(2):
        before = batch.step_s
        async with asyncio.timeout(60):
            await usage_of(session, prompt, max_tokens=1)
        seconds.append(batch.step_s - before)
    assert seconds[1] < seconds[0] / 10
