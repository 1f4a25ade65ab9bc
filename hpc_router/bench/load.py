"""The closed loop: N users, each with one request at a time, through warm-up, steady window and its end.

Users go on asking until the last measured request has ended, so that the slow ones are measured under full load as
well; what still runs then is cancelled. Which request counts for what is decided in `Course`, without I/O.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from hpc_router.bench.ask import Answer, Clock, Target, ask, request_body, session
from hpc_router.bench.config import BenchConfig
from hpc_router.bench.measure import CUT, Observation, Part, Window
from hpc_router.bench.prompts import Prompt, deck

PAUSE_S: Final = 0.1
"""After a failed request its user waits so long: a router that refuses at once must not be flooded."""
Ask = Callable[[Prompt, Answer], Awaitable[None]]


class Watcher(Protocol):
    def ended(self, observation: Observation) -> None: ...


@dataclass(slots=True)
class Course:
    """The stages of one point: so many measured requests, or all that begin before `until_s`."""

    warm_up_s: float
    requests: int | None = None
    until_s: float | None = None
    begun: int = 0
    running: int = 0
    closed: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, now_s: float) -> Part:
        """A request begins: what it counts for."""
        if now_s < self.warm_up_s:
            return Part.WARM_UP
        if self.closed or (self.until_s is not None and now_s >= self.until_s):
            return Part.FILLING
        self.begun += 1
        self.running += 1
        if self.begun == self.requests:
            self.close()
        return Part.MEASURED

    def end(self, part: Part) -> None:
        if part is Part.MEASURED:
            self.running -= 1
            self._settle()

    def close(self) -> None:
        """No request that begins from now on is measured."""
        self.closed = True
        self._settle()

    def _settle(self) -> None:
        if self.closed and not self.running:
            self.over.set()


@dataclass(frozen=True, slots=True)
class Load:
    """What one point saw. `cpu_share`: of one core, used by the load generator itself; near 1 it was the limit."""

    users: int
    started_at: float
    observations: Sequence[Observation]
    window: Window
    cpu_share: float


async def apply_load(
    target: Target, config: BenchConfig, prompts: Sequence[Prompt], *, users: int, watcher: Watcher
) -> Load:
    """One point against a running router."""
    clock = time.perf_counter
    async with session(target, timeout_s=config.timeout_s) as client:

        async def one(prompt: Prompt, answer: Answer) -> None:
            await ask(client, request_body(config, prompt), answer, clock=clock)

        return await closed_loop(one, config, prompts, users=users, watcher=watcher, clock=clock)


async def closed_loop(
    one: Ask, config: BenchConfig, prompts: Sequence[Prompt], *, users: int, watcher: Watcher, clock: Clock
) -> Load:
    until_s = None if config.duration_s is None else config.warmup_s + config.duration_s
    course = Course(config.warmup_s, config.requests, until_s)
    crowd = _Crowd(one, config, prompts, course, watcher, clock)
    started_at, cpu_before_s = time.time(), time.process_time()
    tasks = [asyncio.create_task(crowd.user(number)) for number in range(users)]
    try:
        await _until_over(course, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    elapsed_s = clock() - crowd.zero
    cpu_share = (time.process_time() - cpu_before_s) / elapsed_s if elapsed_s > 0 else 0.0
    window = _window(course, crowd.observations)
    return Load(users, started_at, crowd.observations, window, cpu_share)


async def _until_over(course: Course, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Users never return by themselves: one that does has failed, and its error is ours."""
    over = asyncio.create_task(course.over.wait())
    timer = asyncio.create_task(_close_later(course))
    try:
        done, _ = await asyncio.wait([over, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {over}:
            task.result()
    finally:
        for helper in (over, timer):
            helper.cancel()
            with suppress(asyncio.CancelledError):
                await helper


async def _close_later(course: Course) -> None:
    """Nothing measured may be running when the time has come: then nobody else would notice."""
    if course.until_s is not None:
        await asyncio.sleep(course.until_s)
        course.close()


def _window(course: Course, observations: Sequence[Observation]) -> Window:
    if course.until_s is not None:
        return Window(course.warm_up_s, course.until_s)
    last = max((o.ended_s for o in observations if o.part is Part.MEASURED), default=course.warm_up_s)
    return Window(course.warm_up_s, last)


class _Crowd:
    """Measured requests draw from a deck of their own, so that they are the same ones whatever the warm-up took."""

    def __init__(
        self,
        one: Ask,
        config: BenchConfig,
        prompts: Sequence[Prompt],
        course: Course,
        watcher: Watcher,
        clock: Clock,
    ) -> None:
        self._one, self._course, self._watcher, self._clock = one, course, watcher, clock
        self._measured = deck(prompts, seed=config.seed, stream="measured")
        self._others = deck(prompts, seed=config.seed, stream="others")
        self.zero = clock()
        self.observations: list[Observation] = []

    async def user(self, number: int) -> None:
        while True:
            if await self._request(number) is not None:
                await asyncio.sleep(PAUSE_S)

    async def _request(self, user: int) -> str | None:
        """The kind of error, if it failed."""
        started_s = self._now_s()
        part = self._course.begin(started_s)
        prompt = next(self._measured if part is Part.MEASURED else self._others)
        answer = Answer()
        try:
            await self._one(prompt, answer)
        except asyncio.CancelledError:
            answer.error = CUT
            raise
        finally:
            observation = Observation(
                part=part,
                user=user,
                started_s=started_s,
                ended_s=self._now_s(),
                content_s=tuple(at - self.zero for at in answer.content_at),
                tokens=answer.tokens,
                status=answer.status,
                expert=answer.expert,
                replica=answer.replica,
                reason=answer.reason,
                domain=prompt.domain,
                error=answer.error,
            )
            self.observations.append(observation)
            self._course.end(part)
            self._watcher.ended(observation)
        return answer.error

    def _now_s(self) -> float:
        return self._clock() - self.zero
