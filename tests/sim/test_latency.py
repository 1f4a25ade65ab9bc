import random
import statistics

from hpc_router.sim.kv_cache import BlockPool, SequenceBlocks
from hpc_router.sim.latency import JitteredLatency, LatencyModel, LatencySchedule, RealClock
from tests.sim.calls import SteppedClock


class PerRunning:
    """A latency model that depends on its arguments, as a roofline does."""

    def first_token_s(self, prompt_tokens: int, *, cached_tokens: int, running: int) -> float:
        return (prompt_tokens - cached_tokens) * 0.5

    def next_token_s(self, *, running: int) -> float:
        return running * 0.25


def jittered(*, jitter: float, seed: int = 0) -> LatencyModel:
    return JitteredLatency(ttft_s=0.02, itl_s=0.005, jitter=jitter, rng=random.Random(seed))


def test_without_jitter_latencies_are_the_means() -> None:
    model = jittered(jitter=0.0)
    assert model.first_token_s(10, cached_tokens=0, running=1) == 0.02
    assert model.next_token_s(running=1) == 0.005


def test_cached_tokens_shorten_the_first_token_down_to_that_of_any_other() -> None:
    model = jittered(jitter=0.0)
    found = [model.first_token_s(100, cached_tokens=cached, running=1) for cached in (0, 50, 96)]
    assert found == [0.02, 0.01, 0.005]


def test_jitter_is_seeded_and_keeps_the_mean() -> None:
    model, same = jittered(jitter=0.3), jittered(jitter=0.3)
    samples = [model.next_token_s(running=1) for _ in range(20_000)]
    assert samples[:100] == [same.next_token_s(running=1) for _ in range(100)]
    assert abs(statistics.fmean(samples) / 0.005 - 1) < 0.02
    assert min(samples) > 0


async def test_the_schedule_asks_the_model_and_multiplies_by_the_factor() -> None:
    clock = SteppedClock()
    pace = LatencySchedule(PerRunning(), clock=clock, factor=2.0, blocks=SequenceBlocks(BlockPool(8)))
    await pace.first(3, running=1)
    await pace.next(running=4)
    assert clock.slept == [3.0, 2.0]


async def test_a_late_token_does_not_stretch_the_stream() -> None:
    """Tokens are due at deadlines: the next wait is shorter by what the event loop lost, and never below zero."""
    clock = SteppedClock()
    pace = LatencySchedule(PerRunning(), clock=clock, factor=1.0, blocks=SequenceBlocks(BlockPool(8)))
    clock.time_s += 0.2
    await pace.next(running=4)
    clock.time_s += 5.0
    await pace.next(running=4)
    assert [round(delay, 6) for delay in clock.slept] == [0.8, 0.0]


async def test_the_real_clock_runs() -> None:
    clock = RealClock()
    before = clock.now_s()
    await clock.sleep(0.0)
    assert clock.now_s() >= before
    assert clock.unix_s() > 1_700_000_000
