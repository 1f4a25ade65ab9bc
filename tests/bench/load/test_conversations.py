"""Conversations on the simulated engine, whose prefix cache shows what was sent in which order."""

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from hpc_router.bench.config import read_config
from hpc_router.bench.figures import CANCELLED, MeasurementPart, Observation, figures
from hpc_router.bench.load.generator import LoadResult, LoadTarget, run_load
from hpc_router.bench.prompts import built_in
from hpc_router.bench.workload import Point, workload
from hpc_router.sim.config import SimConfig
from hpc_router.sim.server import SimServer
from tests.bench.fakes import DONE, ROLE, WHOLE, fake_router, piece, responds
from tests.sim.calls import client

FAST = SimConfig(ttft_s=0.0, itl_s=0.0, jitter=0.0, enable_prompt_tokens_details=True)
CHAT: dict[str, Any] = {
    "turns": {"mean": 4},
    "input_words": {"mean": 32},
    "output_tokens": {"mean": 16},
    "system_words": {"mean": 48},
}


async def loaded(
    engine: SimServer, folder: Path, point: Point, *, most: int | None = None, **values: Any
) -> LoadResult:
    config = read_config({"model": "sim", "warmup_s": 0.0, "extra": {"ignore_eos": True}, **values})
    work = workload(config, built_in(), point)
    target = LoadTarget(engine.url, "t")
    load = await asyncio.to_thread(run_load, target, config, work, folder, most_in_flight=most)
    # The load may end just after it has connected. Connections are accepted in order, so now the engine has all.
    async with client(engine) as session:
        assert (await session.get("/health")).status == 200
    return load


def measured(load: LoadResult) -> list[Observation]:
    return [o for o in load.observations if o.part is MeasurementPart.MEASURED]


def check_history(seen: list[Observation]) -> None:
    """Every later turn finds the whole blocks of the prompt before it: 80 words, then 48 more each turn."""
    assert all(o.error is None for o in seen)
    assert {(o.turn, o.prompt_tokens, o.cached_tokens) for o in seen if o.turn != 1} == {
        (2, 128, 80),
        (3, 176, 128),
        (4, 224, 176),
    }
    assert {o.cached_tokens for o in seen if o.turn == 1} == {0, 48}


async def test_a_closed_loop_sends_turn_after_turn_on_each_connection(tmp_path: Path) -> None:
    async with SimServer(FAST) as engine:
        load = await loaded(engine, tmp_path, Point(users=3), requests=24, classes={"chat": CHAT}, conversations=50)
        sent = [received.to_json() for received in engine.recent.last(100)]
    seen = measured(load)
    assert len(sent) >= len(seen) == 24
    check_history(seen)
    for user in range(3):
        turns = [o.turn for o in sorted(seen, key=lambda o: o.started_s) if o.user == user]
        assert turns == [1 + number % 4 for number in range(len(turns))]
    found = figures(seen, load.window)
    assert list(found.turns) == ["1", "2", "3", "4"]
    assert found.classes["chat"].count == 24
    assert found.hit_tokens == sum(o.cached_tokens or 0 for o in seen)
    assert found.turns["4"].hit_share == 176 / 224


async def test_an_open_loop_starts_conversations_at_their_arrivals(tmp_path: Path) -> None:
    """Every conversation that began is sent to its end, and its later turns are due after its pauses."""
    classes = {"chat": {**CHAT, "think_s": 0.02}}
    async with SimServer(FAST) as engine:
        load = await loaded(
            engine, tmp_path, Point(rate_per_s=20), rates=[20], duration_s=2.0, drain_s=30.0, classes=classes
        )
    seen = measured(load)
    check_history(seen)
    firsts = [o for o in seen if o.turn == 1]
    assert len(firsts) > 10
    starts = [o.started_s for o in firsts]
    config = read_config({"rates": [20], "duration_s": 2.0, "classes": classes})
    arrivals = workload(config, built_in(), Point(rate_per_s=20)).arrivals_s
    assert arrivals is not None
    assert sorted(round(at, 6) for at in starts) == [round(at, 6) for at in arrivals if at < 2.0]


async def test_the_history_has_the_engine_s_answers(tmp_path: Path) -> None:
    """Each request sends the content that the engine streamed before, with its escapes, and a cache finds it."""
    classes = {"chat": {**CHAT, "output_tokens": {"mean": 24}}}
    async with SimServer(FAST) as engine:
        load = await loaded(engine, tmp_path, Point(users=2), requests=8, classes=classes, conversations=50)
        bodies = [json.loads(received.body or b"") for received in engine.recent.last(100)]
    conversations: dict[str, list[dict[str, Any]]] = {}
    for body in bodies:
        conversations.setdefault(body["messages"][1]["content"], []).append(body)
    complete = [one for one in conversations.values() if len(one) == 4]
    assert complete
    for one in complete:
        said = [m["content"] for m in one[-1]["messages"] if m["role"] == "assistant"]
        assert all(text.startswith("sim simulated answer") and len(text.split()) == 24 for text in said)
        assert len(set(said)) == 3
        for before, after in pairwise(one):
            assert after["messages"][: len(before["messages"])] == before["messages"]
    # 80 words and an answer of 24, of which the last was not in the cache: six full blocks.
    assert {o.cached_tokens for o in measured(load) if o.turn == 2} == {96}


async def test_escapes_in_an_answer_are_sent_as_they_came(tmp_path: Path) -> None:
    text = 'say "no" \\ \n \u00e9 and \U0001f600'
    async with fake_router(responds(ROLE, piece(text[:9]), piece(text[9:], finish="length"), DONE)) as fake:
        config = read_config({"warmup_s": 0.0, "requests": 3, "classes": {"chat": {**CHAT, "turns": {"mean": 3}}}})
        work = workload(config, built_in(), Point(users=1))
        await asyncio.to_thread(run_load, fake.target, config, work, tmp_path)
    said = [m["content"] for m in fake.bodies[2]["messages"] if m["role"] == "assistant"]
    assert said == [text, text]


async def test_prepared_answers_are_the_same_bytes_in_every_run(tmp_path: Path) -> None:
    classes = {"chat": CHAT}
    config = read_config({"warmup_s": 0.0, "requests": 8, "classes": classes, "history": "prepared"})
    work = workload(config, built_in(), Point(users=1))
    async with fake_router(responds(*WHOLE)) as fake:
        await asyncio.to_thread(run_load, fake.target, config, work, tmp_path)
    assert fake.bodies[:8] == [json.loads(one.body) for one in work.bodies[:8]]


async def test_a_cancelled_request_is_no_failure_and_no_response(tmp_path: Path) -> None:
    async with SimServer(SimConfig(ttft_s=0.0, itl_s=0.001, jitter=0.0)) as engine:
        load = await loaded(
            engine, tmp_path, Point(users=2), requests=20, classes={"chat": {**CHAT, "cancel_share": 0.5}}
        )
    seen = measured(load)
    cancelled = [o for o in seen if o.error == CANCELLED]
    assert 0 < len(cancelled) < 20
    assert all(1 <= len(o.content_s) <= 16 for o in cancelled)
    found = figures(seen, load.window)
    assert (found.requests, found.failed, found.cancelled) == (20, 0, len(cancelled))
    assert found.succeeded == 20 - len(cancelled)


async def test_over_saturation_ends_the_load(tmp_path: Path) -> None:
    """An engine that never answers: the tenth request in flight is one too many, long before the window ends."""
    async with SimServer(SimConfig(ttft_s=1000.0, jitter=0.0)) as engine:
        load = await loaded(engine, tmp_path, Point(rate_per_s=50), rates=[50], duration_s=500.0, most=9)
    assert load.exceeded
    assert len(load.observations) == 10
    assert figures(load.observations, load.window, exceeded=load.exceeded).exceeded


async def test_a_load_within_the_limit_does_not_end_early(tmp_path: Path) -> None:
    async with SimServer(FAST) as engine:
        load = await loaded(engine, tmp_path, Point(rate_per_s=20), rates=[20], duration_s=1.0, most=1000)
    assert not load.exceeded
