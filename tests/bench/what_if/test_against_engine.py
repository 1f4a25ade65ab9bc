"""Predictions beside the simulated engine's own batch loop, which runs with its clients in virtual time.

tests/e2e/test_what_if.py compares with a whole deployment in real time.
"""

import asyncio
import selectors
from random import Random
from statistics import median

import pytest

from hpc_router.bench.conversations import draw_length
from hpc_router.bench.what_if.demand import UserDemand, spread_around
from hpc_router.bench.what_if.service import service_of
from hpc_router.bench.what_if.simulation import Simulation
from hpc_router.config.compose import load_deployment
from hpc_router.config.schema import Roofline
from hpc_router.sim.batch_loop import BatchLoop
from hpc_router.sim.config import SimConfig, kv_blocks
from hpc_router.sim.kv_cache import BlockPool
from hpc_router.sim.roofline import RooflineEngine

PROMPT, ANSWER = spread_around(400, 0.5), spread_around(16, 0.5)
THINK_S, WARM_UP_S = 0.5, 10.0


class _NoWait(selectors.SelectSelector):
    """Never waits, and advances `time_s` by the time that it should have waited."""

    time_s = 0.0

    def select(self, timeout: float | None = None) -> "list[tuple[selectors.SelectorKey, int]]":
        found = super().select(0)
        if not found and timeout:
            self.time_s += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose timers are due at once, in their order."""

    def __init__(self) -> None:
        self._virtual = _NoWait()
        super().__init__(self._virtual)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._virtual.time_s


class LoopClock:
    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_s(self) -> float:
        return self.now_s()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)


async def measured(roofline: Roofline, users: int, for_s: float) -> tuple[float, float]:
    """Returns tokens per second and the median time to the first token, after a warm-up."""
    engine, clock = RooflineEngine(roofline), LoopClock()
    batch = BatchLoop(engine, clock, BlockPool(kv_blocks(SimConfig(roofline=roofline), engine)))
    ttft_s: list[float] = []
    tokens = 0

    async def user(number: int) -> None:
        nonlocal tokens
        source = Random(number)
        while True:
            await asyncio.sleep(source.expovariate(1 / THINK_S))
            prompt, answer, begun_s = draw_length(source, PROMPT), draw_length(source, ANSWER), clock.now_s()
            async with batch.slot(prompt) as slot:
                await slot.first(prompt, running=0)
                first_s = clock.now_s()
                for _ in range(answer - 1):
                    await slot.next(running=0)
            if begun_s >= WARM_UP_S:
                ttft_s.append(first_s - begun_s)
            if clock.now_s() >= WARM_UP_S:
                tokens += answer

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(user(number)) for number in range(users)]
        await asyncio.sleep(WARM_UP_S + for_s)
        for task in tasks:
            task.cancel()
    await batch.close()
    return tokens / for_s, median(ttft_s)


@pytest.mark.parametrize(
    ("users", "for_s"), [(3, 900), (10, 300), (40, 120)], ids=["light", "near saturation", "saturated"]
)
def test_throughput_and_median_first_token_are_those_of_the_batch_loop(users: int, for_s: float) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        tokens_per_s, ttft_s = runner.run(measured(Roofline(gpu="l40s", max_num_seqs=8), users, for_s))
    service = service_of(
        load_deployment(
            [
                *("topology=sim_2replicas", "experts.everything.replicas=1"),
                "experts.everything.engine.options={roofline: {gpu: l40s, max_num_seqs: 8}}",
            ]
        ),
        {},
    )
    demand = UserDemand(
        users=((0, users),), think_s=THINK_S, for_s=600, prompt_tokens=PROMPT, answer_tokens=ANSWER, seed=1
    )
    found = Simulation(service, demand).run().total
    assert found.ttft_s is not None
    assert found.tokens_per_s == pytest.approx(tokens_per_s, rel=0.08)
    assert found.ttft_s.p50 == pytest.approx(ttft_s, rel=0.08)
