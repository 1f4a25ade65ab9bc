"""Continuous batching: which sequence computes when. Blocks and sequences are never lost."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.config.schema import Roofline
from hpc_router.sim.batch_loop import BatchLoop
from hpc_router.sim.continuous_batching import Batch, Sequence
from hpc_router.sim.kv_cache import BlockPool
from hpc_router.sim.roofline import BLOCK, RooflineEngine
from tests.sim.calls import SteppedClock


def steps(batch: Batch, wanted: dict[Sequence, int], most: int = 1000) -> int:
    """Runs steps until every sequence has its tokens. Returns the number of steps."""
    for count in range(most):
        if not wanted:
            return count
        assert batch.plan(), "somebody waits, and nobody computes"
        for one in batch.finish():
            if one.produced == wanted.get(one):
                batch.remove(one)
                del wanted[one]
    raise AssertionError("it does not end")


def test_a_prompt_first_then_a_token_per_step() -> None:
    batch = Batch(BlockPool(64), max_seqs=8, max_tokens=256)
    one = batch.add(100)
    assert [(p.new, p.context) for p in batch.plan()] == [(100, 0)]
    assert batch.finish() == [one]
    assert [(p.new, p.context) for p in batch.plan()] == [(1, 100)]


def test_prompts_are_cut_at_the_step_s_budget_and_decoding_goes_first() -> None:
    batch = Batch(BlockPool(256), max_seqs=8, max_tokens=64)
    first = batch.add(10)
    batch.plan()
    batch.finish()
    batch.add(100)
    assert [(p.new, p.context) for p in batch.plan()] == [(1, 10), (63, 0)]
    assert batch.finish() == [first]
    assert [(p.new, p.context) for p in batch.plan()] == [(1, 11), (37, 63)]
    assert len(batch.finish()) == 2


def test_first_come_first_served_up_to_the_most_sequences() -> None:
    batch = Batch(BlockPool(256), max_seqs=2, max_tokens=256)
    a, b, c = (batch.add(10) for _ in range(3))
    batch.plan()
    assert batch.running == [a, b]
    batch.finish()
    batch.remove(a)
    batch.plan()
    assert batch.running == [b, c]


def test_the_lowest_priority_value_goes_first_and_the_highest_is_sent_back() -> None:
    """As in vLLM's policy `priority`; without it the value has no effect."""
    for by_priority, order in ((True, "cab"), (False, "abc")):
        batch = Batch(BlockPool(256), max_seqs=1, max_tokens=256, by_priority=by_priority)
        named = {name: batch.add(10, priority=value) for name, value in (("a", 1), ("b", 1), ("c", -2))}
        ran = ""
        for _ in range(3):
            batch.plan()
            (one,) = batch.finish()
            ran += next(name for name, added in named.items() if added is one)
            batch.remove(one)
        assert ran == order
        batch = Batch(BlockPool(3), max_seqs=8, max_tokens=256, by_priority=by_priority)
        first, second = batch.add(BLOCK, priority=1), batch.add(BLOCK, priority=-2)
        batch.plan()
        batch.finish()
        batch.plan()
        assert (batch.preempted, batch.running) == (1, [second if by_priority else first])


def test_a_full_cache_sends_the_newest_back() -> None:
    """Two sequences of one block each, in a cache of three blocks: both grow, and one has to wait."""
    batch = Batch(BlockPool(3), max_seqs=8, max_tokens=256)
    first, second = batch.add(BLOCK), batch.add(BLOCK)
    batch.plan()
    batch.finish()
    batch.plan()
    assert (batch.preempted, batch.running, list(batch.waiting)) == (1, [first], [second])
    assert steps(batch, {first: 4, second: 4}) > 0
    assert batch.pool.used == 0


def test_a_prompt_longer_than_the_cache_still_runs() -> None:
    batch = Batch(BlockPool(4), max_seqs=8, max_tokens=1024)
    one = batch.add(10_000)
    assert steps(batch, {one: 2}) == 2


@settings(max_examples=60)
@given(
    given_=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=30),
    blocks=st.integers(20, 60),
    seqs=st.integers(1, 16),
    tokens=st.integers(16, 300),
)
def test_all_end_and_nothing_is_lost(given_: list[tuple[int, int]], blocks: int, seqs: int, tokens: int) -> None:
    batch = Batch(BlockPool(blocks), max_seqs=seqs, max_tokens=max(tokens, seqs))
    wanted = {batch.add(prompt): answer for prompt, answer in given_}
    steps(batch, wanted, most=20_000)
    assert (batch.pool.used, batch.running, list(batch.waiting)) == (0, [], [])


class Yielding(SteppedClock):
    """A clock whose sleeps let other tasks run."""

    async def sleep(self, delay_s: float) -> None:
        await super().sleep(delay_s)
        await asyncio.sleep(0)


async def test_tokens_come_when_steps_are_over() -> None:
    """Times are simulated seconds times the slowdown. A sequence that is removed frees its blocks."""
    clock = Yielding()
    engine = RooflineEngine(Roofline(slowdown=10.0))
    work = BatchLoop(engine, clock, BlockPool(64))
    async with work.slot(100) as slot:
        await slot.first(100, running=1)
        first_s = clock.now_s()
        await slot.next(running=1)
        second_s = clock.now_s()
    assert work.batch.pool.used == 0
    assert work.batch.idle
    await work.close()
    assert 10 * 0.006 < second_s - first_s < 10 * 0.008
    assert (work.lost_s, work.step_s >= second_s - first_s) == (0.0, True)
