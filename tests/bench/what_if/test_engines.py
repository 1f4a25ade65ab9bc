"""The engines of a prediction: tokens are due when the simulated engine's formulas say so."""

from random import Random

import pytest

from hpc_router.bench.what_if.calendar import Calendar
from hpc_router.bench.what_if.engines import FixedEngine, PredictedRequest, StepEngine, make_engine
from hpc_router.config.schema import Roofline
from hpc_router.sim.config import SimConfig
from hpc_router.sim.counted_batch import CountedBatch
from hpc_router.sim.roofline import RooflineEngine, SequenceStep

GPU = Roofline(gpu="l40s")
MODEL = RooflineEngine(GPU)


class Client:
    """Sends requests to an engine at given times, and keeps the times of their first and last tokens."""

    def __init__(self, config: SimConfig) -> None:
        self.calendar = Calendar()
        self.ends: dict[PredictedRequest, float] = {}
        self.engine = make_engine(config, self.calendar, self.done)

    def done(self, request: PredictedRequest) -> None:
        self.ends[request] = self.calendar.now_s

    def at(self, at_s: float, prompt: int, answer: int) -> PredictedRequest:
        request = PredictedRequest("e", at_s, prompt, answer)
        self.calendar.at(at_s, self.engine.submit, request)
        return request


def test_one_request_takes_its_prefill_and_one_step_per_token() -> None:
    client = Client(SimConfig(roofline=GPU))
    request = client.at(2.0, 300, 50)
    client.calendar.run(100)
    prefill_s = MODEL.step_s([SequenceStep(300, 0)])
    assert request.first_s == pytest.approx(2 + prefill_s)
    steps_s = sum(MODEL.step_s([SequenceStep(1, 300 + n)]) for n in range(49))
    assert client.ends[request] == pytest.approx(request.first_s + steps_s)


def test_a_request_that_comes_during_a_step_joins_the_next_one() -> None:
    client = Client(SimConfig(roofline=GPU))
    client.at(0.0, 100, 400)
    first_s = MODEL.step_s([SequenceStep(100, 0)])
    step_s = MODEL.step_s([SequenceStep(1, 100)])
    second = client.at(first_s + step_s * 1.5, 80, 10)
    client.calendar.run(100)
    begun_s = first_s + step_s + MODEL.step_s([SequenceStep(1, 101)])
    both_s = MODEL.step_s([SequenceStep(1, 102), SequenceStep(80, 0)])
    assert second.first_s == pytest.approx(begun_s + both_s)


@pytest.mark.parametrize(
    "config",
    [
        SimConfig(roofline=Roofline(gpu="l40s", max_num_seqs=6)),
        SimConfig(roofline=Roofline(gpu="a100-sxm"), capacity=4, num_gpu_blocks_override=200),  # preempts
        SimConfig(roofline=Roofline(model="llama3-70b", tensor_parallel_size=4, pipeline_parallel_size=2)),
    ],
    ids=["few sequences", "small cache", "parallel"],
)
def test_many_steps_as_one_event_are_the_same_steps(config: SimConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def times() -> list[tuple[float, float]]:
        source, client = Random(3), Client(config)
        sent = [client.at(source.uniform(0, 60), source.randint(1, 900), source.randint(1, 300)) for _ in range(120)]
        client.calendar.run(10_000)
        return [(one.first_s, client.ends[one]) for one in sent]

    in_runs = times()
    monkeypatch.setattr(CountedBatch, "equal_steps", lambda _batch: 1)
    assert [value for pair in times() for value in pair] == pytest.approx([value for pair in in_runs for value in pair])


def test_an_engine_with_fixed_latencies_and_one_place() -> None:
    client = Client(SimConfig(ttft_s=0.5, itl_s=0.1, jitter=0, capacity=1))
    first, second = client.at(0.0, 10, 11), client.at(0.2, 10, 1)
    client.calendar.run(100)
    assert isinstance(client.engine, FixedEngine)
    assert (first.first_s, client.ends[first]) == pytest.approx((0.5, 1.5))
    assert (second.first_s, client.ends[second]) == pytest.approx((2.0, 2.0))


def test_a_roofline_makes_an_engine_of_steps() -> None:
    assert isinstance(Client(SimConfig(roofline=GPU)).engine, StepEngine)
