"""Load on a real server: errors, measured requests, and reproducible order."""

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hpc_router.bench.config import BenchConfig, read_config
from hpc_router.bench.figures import CUT, MeasurementPart, Observation
from hpc_router.bench.load import load_jobs as load_jobs_module
from hpc_router.bench.load.generator import LoadResult, LoadTarget, from_json, merged, run_load, window_of
from hpc_router.bench.load.load_jobs import start_load_jobs
from hpc_router.bench.prompts import BenchPrompt, built_in
from hpc_router.bench.workload import Point, workload
from hpc_router.errors import LaunchError
from tests.bench.fakes import (
    DONE,
    HEADERS,
    ROLE,
    TOKEN,
    WHOLE,
    FakeRouter,
    Handler,
    event,
    fake_router,
    piece,
    resets_after,
    responds,
    usage,
    waits_after,
)  # fmt: skip
from tests.support.waiting import GUARD_S

PROMPTS = built_in()


@pytest.fixture(autouse=True)
def _tolerate_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_jobs_module, "MAX_SKEW_S", GUARD_S)


async def loaded(fake: FakeRouter, folder: Path, *, users: int = 1, repeat: int = 0, **values: object) -> LoadResult:
    config = read_config({"warmup_s": 0.0, **({} if "duration_s" in values else {"requests": 1}), **values})
    work = workload(config, PROMPTS, Point(users=users, repeat=repeat))
    return await asyncio.to_thread(run_load, fake.target, config, work, folder)


def measured(load: LoadResult) -> list[Observation]:
    return [o for o in load.observations if o.part is MeasurementPart.MEASURED]


async def test_a_response_is_timed_by_its_content(tmp_path: Path) -> None:
    """Role, empty content and end carry no token; the response headers name expert, replica and reason."""
    async with fake_router(
        responds(ROLE, piece(""), piece("a b"), piece(" c d", finish="length"), usage(4), DONE)
    ) as fake:
        (one,) = measured(await loaded(fake, tmp_path))
    assert one.error is None
    assert (len(one.content_s), one.tokens, one.prompt_tokens) == (2, 4, 5)
    assert (one.expert, one.replica, one.reason) == tuple(HEADERS.values())
    assert 0 <= one.started_s <= one.content_s[0] <= one.content_s[1] <= one.ended_s
    assert set(fake.tokens) == {f"Bearer {TOKEN}"}
    assert one.domain in {"code", "math", "medicine", "law", "general"}
    assert not (tmp_path / "requests").exists(), "it contains the token"


def delta(**fields: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields}]})


CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "look_up", "arguments": ""}}


@pytest.mark.parametrize(
    "pieces",
    [
        [delta(reasoning_content="so"), delta(reasoning_content=" on")],
        [delta(reasoning="so"), delta(reasoning=" on")],
        [delta(tool_calls=[CALL]), delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}])],
        [delta(content=None, reasoning="so"), delta(content="", tool_calls=[CALL])],
    ],
)
async def test_reasoning_and_tool_calls_are_output_too(tmp_path: Path, pieces: list[bytes]) -> None:
    """An answer without text is complete. A delta whose fields are all empty contains no token."""
    empty = delta(content=None, reasoning_content="", reasoning=None, tool_calls=[])
    async with fake_router(responds(ROLE, empty, *pieces, piece(None, finish="tool_calls"), usage(2), DONE)) as fake:
        (one,) = measured(await loaded(fake, tmp_path))
    assert (one.error, len(one.content_s), one.tokens) == (None, 2, 2)


@pytest.mark.parametrize(
    ("handler", "kind", "pieces"),
    [
        (responds(piece("a"), event({"error": {"message": "the replica died"}})), "stream_error", 1),
        (resets_after(piece("a"), piece("b")), "disconnected", 2),
        (resets_after(), "disconnected", 0),
        (responds(piece("a"), piece("b")), "unfinished", 2),
        (responds(ROLE, piece(None, finish="stop"), DONE), "no_content", 0),
        (responds(b'{"choices": []}', content_type="application/json"), "not_a_stream", 0),
        (responds(b"{}", content_type="application/json", status=429), "http_429", 0),
        (responds(b"{}", content_type="application/json", status=503), "http_503", 0),
    ],
)
async def test_an_incomplete_response_is_an_error(tmp_path: Path, handler: Handler, kind: str, pieces: int) -> None:
    async with fake_router(handler) as fake:
        (one,) = measured(await loaded(fake, tmp_path))
    assert (one.error, len(one.content_s)) == (kind, pieces)


async def test_a_finish_reason_ends_a_stream_without_done(tmp_path: Path) -> None:
    async with fake_router(responds(piece("a"), piece("b", finish="length"))) as fake:
        (one,) = measured(await loaded(fake, tmp_path))
    assert one.error is None


async def test_a_connection_without_data_is_an_error(tmp_path: Path) -> None:
    never = asyncio.Event()
    async with fake_router(waits_after(piece("a"), until=never)) as fake:
        (one,) = measured(await loaded(fake, tmp_path, timeout_s=0.2))
        never.set()
    assert one.error == "timeout"


async def test_a_refused_connection_is_an_error(tmp_path: Path) -> None:
    async with fake_router(responds()) as fake:
        pass
    (one,) = measured(await loaded(fake, tmp_path))
    assert one.error == "connect"


async def test_load_continues_until_the_last_measured_request_has_ended(tmp_path: Path) -> None:
    """The first response waits for ten other requests, although only two requests are measured."""
    enough, others = asyncio.Event(), 0

    async def counted(fake: FakeRouter, request: object) -> object:
        nonlocal others
        others += 1
        if others == 10:
            enough.set()
        return await responds(*WHOLE)(fake, request)  # type: ignore[arg-type]

    async with fake_router(waits_after(piece("a"), until=enough, then=WHOLE), counted) as fake:  # type: ignore[arg-type]
        load = await loaded(fake, tmp_path, users=2, requests=2)
    assert len(measured(load)) == 2
    assert sum(o.part is MeasurementPart.FILLING for o in load.observations) >= 8
    assert {o.error for o in load.observations} <= {None, CUT}
    assert load.window.end_s == max(o.ended_s for o in measured(load))


async def test_parts_by_time(tmp_path: Path) -> None:
    """Exactly the requests that begin in the window are measured."""
    async with fake_router(responds(*WHOLE)) as fake:
        load = await loaded(fake, tmp_path, users=3, warmup_s=0.3, duration_s=1.5)
    for one in load.observations:
        due = (
            MeasurementPart.WARM_UP
            if one.started_s < 0.3
            else MeasurementPart.MEASURED
            if one.started_s < 1.8
            else MeasurementPart.FILLING
        )
        assert one.part is due
    assert {MeasurementPart.WARM_UP, MeasurementPart.MEASURED} <= {o.part for o in load.observations}
    assert (load.window.start_s, load.window.end_s) == (0.3, 1.8)
    assert fake.max_running <= 3


async def test_the_measured_order_depends_on_the_seed_not_on_the_warm_up(tmp_path: Path) -> None:
    async def measured_order(**values: object) -> list[int | None]:
        async with fake_router(responds(*WHOLE)) as fake:
            load = await loaded(fake, tmp_path, requests=8, **values)  # type: ignore[arg-type]
        return [o.question for o in measured(load)]

    first = await measured_order(seed=1)
    assert first == await measured_order(seed=1, warmup_s=0.1)
    assert first != await measured_order(seed=2)
    assert first != await measured_order(seed=1, repeat=1)


async def test_an_open_loop_counts_from_when_a_request_was_due(tmp_path: Path) -> None:
    """With one connection and arrivals faster than responses, the latency includes the wait for the connection."""

    async def slow(fake: FakeRouter, request: object) -> object:
        await asyncio.sleep(0.05)
        return await responds(*WHOLE)(fake, request)  # type: ignore[arg-type]

    config = read_config({"rates": [60.0], "warmup_s": 0.0, "duration_s": 0.5, "connections": 1})
    async with fake_router(slow) as fake:  # type: ignore[arg-type]
        work = workload(config, PROMPTS, Point(rate_per_s=60.0))
        load = await asyncio.to_thread(run_load, fake.target, config, work, tmp_path)
    waits = [o.e2e_s for o in measured(load)]
    assert len(waits) > 15
    assert max(waits) > 4 * min(waits)
    assert all(o.started_s < 0.5 for o in measured(load))


async def test_several_load_jobs_share_the_users(tmp_path: Path) -> None:
    """Three processes and four users, whose requests run at the same time; the results are merged."""
    config = read_config({"load_jobs": 3, "requests": 12, "warmup_s": 0.0})
    all_here = asyncio.Event()

    async def together(fake: FakeRouter, request: object) -> object:
        if fake.running == 4:
            all_here.set()
        async with asyncio.timeout(20):
            await all_here.wait()
        return await responds(*WHOLE)(fake, request)  # type: ignore[arg-type]

    def load(target: LoadTarget) -> LoadResult:
        with start_load_jobs(config, shared=tmp_path) as load_jobs:
            return load_jobs.run(target, config, PROMPTS, Point(users=4))

    async with fake_router(together) as fake:  # type: ignore[arg-type]
        found = await asyncio.to_thread(load, fake.target)
        assert fake.max_running == 4
    assert len(measured(found)) == 12
    assert {o.error for o in measured(found)} == {None}
    assert list(tmp_path.iterdir()) == [], "task files contain the token"


async def test_a_load_job_without_a_user_is_idle_until_the_next_point(tmp_path: Path) -> None:
    config = read_config({"load_jobs": 2, "requests": 4, "warmup_s": 0.0})

    def load(target: LoadTarget) -> list[LoadResult]:
        with start_load_jobs(config, shared=tmp_path) as load_jobs:
            return [load_jobs.run(target, config, PROMPTS, Point(users=users)) for users in (1, 2)]

    async with fake_router(responds(*WHOLE)) as fake:
        found = await asyncio.to_thread(load, fake.target)
    assert [len(measured(one)) for one in found] == [4, 4]
    assert {o.error for one in found for o in measured(one)} == {None}


async def test_load_jobs_accept_large_prompts(tmp_path: Path) -> None:
    config = read_config({"load_jobs": 2, "requests": 2, "warmup_s": 0.0})
    prompts = [*PROMPTS, *(BenchPrompt("x" * 2**16, "code") for _ in range(20))]

    def load(target: LoadTarget) -> LoadResult:
        with start_load_jobs(config, shared=tmp_path) as load_jobs:
            return load_jobs.run(target, config, prompts, Point(users=2))

    async with fake_router(responds(*WHOLE)) as fake:
        found = await asyncio.to_thread(load, fake.target)
    assert {o.error for o in measured(found)} == {None}


async def test_load_jobs_that_start_apart_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config({"load_jobs": 2, "requests": 2, "warmup_s": 0.0})
    monkeypatch.setattr(load_jobs_module, "MAX_SKEW_S", -1.0)

    def load(target: LoadTarget) -> LoadResult:
        with start_load_jobs(config, shared=tmp_path) as load_jobs:
            return load_jobs.run(target, config, PROMPTS, Point(users=2))

    async with fake_router(responds(*WHOLE)) as fake:
        with pytest.raises(LaunchError, match="s apart"):
            await asyncio.to_thread(load, fake.target)


def test_a_result_survives_json_and_merging() -> None:
    config = replace(BenchConfig(), requests=1)
    one = Observation(part=MeasurementPart.MEASURED, user=0, started_s=1.0, ended_s=2.0, content_s=[1.5], tokens=3)
    load = LoadResult(5.0, [one], window_of(config, [one]), 0.1, 0.2)
    assert from_json(json.loads(json.dumps(asdict(load)))) == load
    both = merged([load, replace(load, started_at=4.0, cpu_share=0.5)])
    assert (both.started_at, len(both.observations), both.cpu_share) == (4.0, 2, 0.5)


def test_addresses() -> None:
    assert TOKEN not in repr(LoadTarget("http://127.0.0.1:1", TOKEN))
    assert LoadTarget("http://127.0.0.1:81", "").address == ("127.0.0.1", 81)
    with pytest.raises(LaunchError, match="plain HTTP"):
        _ = LoadTarget("https://127.0.0.1:1", "").address
