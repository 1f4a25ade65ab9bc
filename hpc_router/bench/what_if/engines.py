"""The engines of a prediction: when the tokens of a request are due, by the models of the simulated engine."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from hpc_router.bench.what_if.calendar import Calendar
from hpc_router.sim.config import SimConfig, kv_blocks
from hpc_router.sim.counted_batch import CountedBatch, CountedSequence
from hpc_router.sim.latency import JitteredLatency, fixed_latency
from hpc_router.sim.roofline import RooflineEngine

_SAME: Final = 1e-9
"""Relative difference up to which two durations count as equal."""


@dataclass(slots=True, eq=False)
class PredictedRequest:
    """One request. `expert`: the expert that it is for. Times are seconds of the calendar; `sent_s`: when a replica got
    it; None while it has not happened. `refused`: whether it was refused."""

    expert: str
    arrived_s: float
    prompt_tokens: int
    answer_tokens: int
    sent_s: float | None = None
    first_s: float = 0.0
    refused: bool = False


Done = Callable[[PredictedRequest], None]
"""Called when the last token of a request is due."""


class PredictedEngine(Protocol):
    """The interface of an engine of a prediction."""

    def submit(self, request: PredictedRequest) -> None:
        """Takes a request. Sets its `first_s` when its first token is due, and calls `done` at its last one."""


def make_engine(config: SimConfig, calendar: Calendar, done: Done) -> PredictedEngine:
    """Returns the engine with these settings. Raises ConfigError if its model does not fit on its GPUs."""
    if config.roofline is None:
        return FixedEngine(config, calendar, done)
    return StepEngine(config, RooflineEngine(config.roofline), calendar, done)


class FixedEngine:
    """An engine with latencies that do not depend on its load."""

    def __init__(self, config: SimConfig, calendar: Calendar, done: Done) -> None:
        self._calendar, self._done = calendar, done
        self._latency: JitteredLatency = fixed_latency(config)
        self._itl_s, self._capacity = config.itl_s, config.capacity
        self._running = 0
        self._waiting: deque[PredictedRequest] = deque()

    def submit(self, request: PredictedRequest) -> None:
        if self._capacity is not None and self._running >= self._capacity:
            self._waiting.append(request)
            return
        self._running += 1
        now_s = self._calendar.now_s
        first_s = self._latency.first_token_s(request.prompt_tokens, cached_tokens=0, running=self._running)
        request.first_s = now_s + first_s
        self._calendar.at(request.first_s + (request.answer_tokens - 1) * self._itl_s, self._end, request)

    def _end(self, request: PredictedRequest) -> None:
        self._running -= 1
        if self._waiting:
            self.submit(self._waiting.popleft())
        self._done(request)


class StepEngine:
    """An engine that computes in steps of a batch, whose durations a roofline predicts.

    Steps between two changes of the batch are one event: each computes one token for the same sequences, and their
    durations grow evenly. A request that comes meanwhile joins after the step that is under way.
    """

    def __init__(self, config: SimConfig, roofline: RooflineEngine, calendar: Calendar, done: Done) -> None:
        self._calendar, self._done, self._roofline = calendar, done, roofline
        seqs = roofline.max_seqs if config.capacity is None else min(config.capacity, roofline.max_seqs)
        self._batch = CountedBatch(kv_blocks(config, roofline), config.block_size, seqs, roofline.max_tokens)
        self._requests: dict[CountedSequence, PredictedRequest] = {}
        self._begun_s = 0.0
        self._steps = 0  # steps under way; 0: idle
        self._first_s = self._growth_s = 0.0  # duration of the first of them; by how much each one is longer
        self._run = 0  # number of the present run of steps; the end of an earlier one is ignored

    def submit(self, request: PredictedRequest) -> None:
        batch = self._batch
        self._requests[batch.add(request.prompt_tokens, request.answer_tokens)] = request
        if not self._steps:
            self._begin()
        elif self._steps > 1 and batch.running < batch.max_seqs:
            self._end_early()

    def _begin(self) -> None:
        """Plans the next steps, up to the next change of the batch."""
        batch, work_s = self._batch, self._roofline.work_s
        work = batch.plan()
        if work is None:
            self._steps = 0
            return
        first_s, steps, growth_s = work_s(work), batch.equal_steps(), 0.0
        while steps > 1:
            # The longer of two durations that grow evenly: their sum is exact only while the same one is longer.
            growth_s = (work_s(batch.later_work(steps - 1)) - first_s) / (steps - 1)
            half = (steps - 1) // 2
            middle_s = first_s if not half else work_s(batch.later_work(half))
            if abs(first_s + half * growth_s - middle_s) <= _SAME * middle_s:
                break
            steps //= 2
        self._begun_s, self._steps = self._calendar.now_s, steps
        self._first_s, self._growth_s = first_s, growth_s if steps > 1 else 0.0
        self._schedule_end()

    def _until_s(self, steps: int) -> float:
        """Returns the duration of the first `steps` steps of this run."""
        return steps * self._first_s + self._growth_s * steps * (steps - 1) / 2

    def _schedule_end(self) -> None:
        self._run += 1
        self._calendar.at(self._begun_s + self._until_s(self._steps), self._end, self._run)

    def _end_early(self) -> None:
        """Ends this run with the step that is under way now."""
        elapsed_s = self._calendar.now_s - self._begun_s
        longest_s = self._first_s + self._growth_s * (self._steps - 1)
        steps = max(1, int(elapsed_s / max(longest_s, self._first_s)))
        while steps < self._steps and self._until_s(steps) < elapsed_s:
            steps += 1
        if steps < self._steps:
            self._steps = steps
            self._schedule_end()

    def _end(self, run: int) -> None:
        if run != self._run:
            return
        now_s, requests = self._calendar.now_s, self._requests
        first, last = self._batch.finish(self._steps)
        for one in first:
            requests[one].first_s = now_s
        done = [requests.pop(one) for one in last]
        self._begin()  # before clients can react to the answers, as in a real engine
        for request in done:
            self._done(request)
