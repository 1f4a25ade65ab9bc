"""The closed loop: who asks when, which requests count, and that the load holds until the last of them has ended."""

import asyncio

import pytest
from hpc_router.bench.ask import Answer, Clock
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.bench.config import BenchConfig, read_config
from hpc_router.bench.load import Ask, Course, Load, apply_load, closed_loop
from hpc_router.bench.measure import CUT, Observation, Part
from hpc_router.bench.prompts import Prompt, built_in
from tests.bench.fakes import WHOLE, fake_router, piece, says, waits_after
from tests.waiting import eventually

PROMPTS = built_in()


class Seen:
    def __init__(self) -> None:
        self.observations: list[Observation] = []

    def ended(self, observation: Observation) -> None:
        self.observations.append(observation)


class Stepped:
    """A clock that moves by what answers take, not by itself."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def loop_of(one: Ask, clock: Clock, *, users: int = 1, **values: object) -> Load:
    config = read_config({"warmup_s": 0.0, **values})
    return await closed_loop(one, config, PROMPTS, users=users, watcher=Seen(), clock=clock)


def parts(load: Load) -> list[Part]:
    return [o.part for o in load.observations]


async def test_warm_up_measured_then_filling() -> None:
    """One user, answers of a second each: two seconds of warm-up, three measured; nothing follows the last one."""
    clock = Stepped()

    async def one(_prompt: Prompt, answer: Answer) -> None:
        clock.now_s += 1.0
        answer.content_at.append(clock())
        await asyncio.sleep(0)

    load = await loop_of(one, clock, warmup_s=2.0, requests=3)
    assert parts(load)[:5] == [Part.WARM_UP] * 2 + [Part.MEASURED] * 3
    assert set(parts(load)[5:]) <= {Part.FILLING}
    assert (load.window.start_s, load.window.end_s) == (2.0, 5.0)


async def test_load_is_held_until_the_slowest_measured_request_has_ended() -> None:
    """The first prompt's answer takes until ten others came, though only two requests are measured."""
    clock = Stepped()
    others = 0
    enough = asyncio.Event()
    slow = asyncio.Event()

    async def one(_prompt: Prompt, answer: Answer) -> None:
        nonlocal others
        if not slow.is_set():
            slow.set()
            await enough.wait()
        else:
            others += 1
            if others == 10:
                enough.set()
            await asyncio.sleep(0)
        clock.now_s += 0.1
        answer.content_at.append(clock())

    load = await loop_of(one, clock, users=2, requests=2)
    assert sum(part is Part.MEASURED for part in parts(load)) == 2
    assert sum(part is Part.FILLING for part in parts(load)) >= 9
    assert all(o.error in (None, CUT) for o in load.observations)
    assert load.window.end_s == max(o.ended_s for o in load.observations if o.part is Part.MEASURED)


async def test_an_error_of_the_load_generator_is_raised() -> None:
    async def one(_prompt: Prompt, _answer: Answer) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await loop_of(one, Stepped(), users=3, requests=3)


async def test_a_window_without_any_request_ends_all_the_same() -> None:
    """Every user is still at its warm-up request when the window closes."""

    async def one(_prompt: Prompt, _answer: Answer) -> None:
        await asyncio.Event().wait()

    load = await loop_of(one, Stepped(), users=2, warmup_s=0.01, duration_s=0.01)
    assert parts(load) == [Part.WARM_UP] * 2
    assert {o.error for o in load.observations} == {CUT}


async def test_the_same_seed_asks_the_same() -> None:
    async def asked(seed: int, warmup_s: float) -> list[str]:
        clock, texts = Stepped(), []

        async def one(prompt: Prompt, answer: Answer) -> None:
            if clock.now_s >= 100.0 + warmup_s:
                texts.append(prompt.text)
            clock.now_s += 1.0
            await asyncio.sleep(0)

        await loop_of(one, clock, seed=seed, requests=8, warmup_s=warmup_s)
        return texts[:8]

    assert await asked(1, 0.0) == await asked(1, 3.0)
    assert await asked(1, 0.0) != await asked(2, 0.0)


async def test_users_against_a_real_server() -> None:
    """So many at once and never more; one bad answer is an error, no latency; the watcher sees every end."""
    async with fake_router(says(piece("a")), says(*WHOLE)) as fake:
        seen = Seen()
        config = read_config({"requests": 12, "warmup_s": 0.0, "model": "math", "extra": {"temperature": 0}})
        load = await apply_load(fake.target, config, PROMPTS, users=3, watcher=seen)
    assert fake.most_running <= 3
    assert seen.observations == load.observations
    measured = [o for o in load.observations if o.part is Part.MEASURED]
    assert sorted(o.error or "" for o in measured) == [""] * 11 + ["unfinished"]
    assert all((body["model"], body["temperature"]) == ("math", 0) for body in fake.bodies)
    good = [o for o in measured if o.error is None]
    assert all(0 <= o.started_s <= o.content_s[0] <= o.content_s[-1] <= o.ended_s for o in good)


async def test_cancelling_leaves_no_request_behind() -> None:
    for_ever = asyncio.Event()
    async with fake_router(waits_after(piece("a"), until=for_ever)) as fake:
        config = read_config({"requests": 4})
        point = asyncio.create_task(apply_load(fake.target, config, PROMPTS, users=2, watcher=Seen()))
        await eventually(lambda: fake.running == 2)
        point.cancel()
        with pytest.raises(asyncio.CancelledError):
            await point
        await eventually(lambda: fake.running == 0)


@given(
    ends=st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 3.0)), max_size=60),
    requests=st.integers(1, 10),
    warm_up_s=st.floats(0.0, 5.0),
)
def test_a_course_measures_as_many_as_it_should(ends: list[tuple[int, float]], requests: int, warm_up_s: float) -> None:
    """Whatever the order in which requests begin and end: never more than asked, over exactly when all have ended."""
    course, now_s, running = Course(warm_up_s, requests), 0.0, []
    for batch, step_s in ends:
        for _ in range(batch):
            running.append(course.begin(now_s))
        now_s += step_s
        for _ in range(min(batch, len(running))):
            course.end(running.pop(0))
        alive = sum(part is Part.MEASURED for part in running)
        assert course.running == alive
        assert course.begun <= requests
        assert course.over.is_set() == (course.begun == requests and alive == 0)


def test_a_course_by_time_closes_exactly_at_its_end() -> None:
    course = Course(1.0, None, 3.0)
    assert [course.begin(at) for at in (0.99, 1.0, 2.99, 3.0)] == [
        Part.WARM_UP,
        Part.MEASURED,
        Part.MEASURED,
        Part.FILLING,
    ]


def test_defaults_measure_by_time() -> None:
    assert read_config({}).duration_s == 30.0
    assert read_config({"requests": 5}).duration_s is None
    assert BenchConfig().model == "auto"
