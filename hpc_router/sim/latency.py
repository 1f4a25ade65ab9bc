"""The clock and the latency models, which decide when tokens are due.

A latency model has two functions and stores no requests. A token is due at a deadline, not after a sum of sleeps, so a
busy event loop delays one token but not the rest of the stream. Time comes from a `Clock`, so tests need no real time.
"""

import asyncio
import random
import time
from typing import Protocol

from hpc_router.sim.config import SimConfig
from hpc_router.sim.kv_cache import SequenceBlocks


class LatencyModel(Protocol):
    """The interface of a latency model."""

    def first_token_s(self, prompt_tokens: int, *, cached_tokens: int, running: int) -> float:
        """Returns the seconds from admission to the first token. `cached_tokens`: prompt tokens that need not be
        computed. `running` includes this request."""

    def next_token_s(self, *, running: int) -> float:
        """Returns the seconds between two tokens of one request while `running` requests share the engine."""


class Clock(Protocol):
    """The source of time, which tests can replace."""

    def now_s(self) -> float:
        """Returns the time of a monotonic clock in seconds."""

    def unix_s(self) -> float:
        """Returns the wall-clock time in Unix seconds, for the `created` fields."""

    async def sleep(self, delay_s: float) -> None:
        """Suspends the task for `delay_s` seconds; with 0, for one iteration of the event loop, so that a cancellation
        takes effect."""


class RealClock:
    """The clock of the machine."""

    def now_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)


class JitteredLatency:
    """A latency model with log-normal latencies and two fixed means, independent of the load. `jitter`: sigma; 0 gives
    the means. The mean time to the first token falls in proportion to the cached tokens, but not below the mean time
    between tokens."""

    def __init__(self, *, ttft_s: float, itl_s: float, jitter: float, rng: random.Random) -> None:
        self._ttft_s, self._itl_s = ttft_s, itl_s
        self._jitter = jitter
        self._rng = rng

    def first_token_s(self, prompt_tokens: int, *, cached_tokens: int, running: int) -> float:
        if not cached_tokens:
            return self._spread(self._ttft_s)
        computed_s = self._ttft_s * (prompt_tokens - cached_tokens) / prompt_tokens
        return self._spread(min(self._ttft_s, max(self._itl_s, computed_s)))

    def next_token_s(self, *, running: int) -> float:
        return self._spread(self._itl_s)

    def _spread(self, mean_s: float) -> float:
        if not self._jitter or not mean_s:
            return mean_s
        # mu = -sigma^2/2 makes the mean of exp(N(mu, sigma)) exactly 1.
        return mean_s * self._rng.lognormvariate(-self._jitter * self._jitter / 2, self._jitter)


def fixed_latency(config: SimConfig) -> JitteredLatency:
    """Returns the latency model of an engine without a roofline."""
    rng = random.Random(f"latency/{config.seed}")
    return JitteredLatency(ttft_s=config.ttft_s, itl_s=config.itl_s, jitter=config.jitter, rng=rng)


class TokenSchedule(Protocol):
    """Decides when the tokens of one request are due."""

    @property
    def cached_tokens(self) -> int:
        """Returns the number of prompt tokens from the prefix cache, which is known from the first token on."""

    async def first(self, prompt_tokens: int, *, running: int) -> None:
        """Waits until the first token is due."""

    async def next(self, *, running: int) -> None:
        """Waits until the next token is due."""


class LatencySchedule:
    """A token schedule from a latency model. `factor` multiplies every latency. `blocks`: the cache blocks of the
    request. If no block is free, the request does not wait for one; its further tokens are then not cached."""

    def __init__(self, latency: LatencyModel, *, clock: Clock, factor: float, blocks: SequenceBlocks) -> None:
        self._latency, self._clock, self._factor, self._blocks = latency, clock, factor, blocks
        self._due_s = clock.now_s()
        self._tokens = 0

    @property
    def cached_tokens(self) -> int:
        return self._blocks.cached_tokens

    async def first(self, prompt_tokens: int, *, running: int) -> None:
        cached_tokens = self._blocks.begin(prompt_tokens, self._blocks.find(prompt_tokens))
        self._blocks.grow(prompt_tokens)
        self._tokens = prompt_tokens
        await self._wait(self._latency.first_token_s(prompt_tokens, cached_tokens=cached_tokens, running=running))

    async def next(self, *, running: int) -> None:
        self._tokens += 1
        self._blocks.grow(self._tokens)
        await self._wait(self._latency.next_token_s(running=running))

    async def _wait(self, delay_s: float) -> None:
        self._due_s += delay_s * self._factor
        await self._clock.sleep(max(0.0, self._due_s - self._clock.now_s()))
