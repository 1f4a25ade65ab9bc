"""Turns that continue a response go where it is kept, and nowhere else."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from hpc_router.errors import BadRequestError, PreviousResponseNotFoundError
from hpc_router.net import protocol
from hpc_router.relay.headers import Headers
from hpc_router.router.replicas.replica import Event, Replica
from hpc_router.router.replicas.sessions import Sessions, Turn, session_id
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.routing.policy import RouteReason
from hpc_router.state import registry
from hpc_router.state.registry import EngineInfo, Record, RecordKind, State
from tests.router.fakes import a_deployment, a_router, a_run, answer, fake_replica, hang, refuse
from tests.router.support import all_gauges_zero, client_of, post, ready, sim_replica
from tests.support.waiting import eventually

HEADERS = {protocol.SESSION_HEADER: "s1"}
NEXT = {"model": "auto", "input": "and then?", "previous_response_id": "resp_1"}


def a_turn(number: int = 0) -> Turn:
    return Turn("math", f"math-{number}.g1", "http://127.0.0.1:1", "n", RouteReason.CLASSIFIED)


def a_table(**fields: Any) -> ReplicaTable:
    record = Record(
        RecordKind.EXPERT,
        "math-0.g1",
        "http://127.0.0.1:1",
        State.READY,
        {"math": "m"},
        nonce="n",
        engine=EngineInfo("vllm"),
    )
    table = ReplicaTable()
    table.put(Replica(replace(record, **fields), key="k"))
    for replica in table.all():
        replica.apply(Event.SAYS_READY)
    return table


def test_the_session_unused_for_longest_is_forgotten() -> None:
    sessions = Sessions(most=2)
    for name in ("a", "b"):
        sessions.note(name, a_turn())
    assert sessions.find("a") is not None
    sessions.note("b", a_turn(1))
    sessions.note("a", a_turn())
    sessions.note("c", a_turn())
    assert [sessions.find(name) is not None for name in "abc"] == [True, False, True]
    assert len(sessions) == 2


def headers(session: str | None) -> Headers:
    return Headers([] if session is None else [(b"x-session-id", session.encode())])


@pytest.mark.parametrize("header", [None, "a", "A-b_c.d:e@f/g+h=i~j", "x" * 128])
def test_session_ids_that_are(header: str | None) -> None:
    assert session_id(headers(header)) == header


@pytest.mark.parametrize("header", ["", " ", "a b", "x" * 129, "\u00e9", "a\n", "a,b", '"'])
def test_session_ids_that_are_none(header: str) -> None:
    with pytest.raises(BadRequestError, match="1 to 128"):
        session_id(headers(header))


def test_a_body_that_continues_nothing_goes_anywhere() -> None:
    for fields in ({}, {"previous_response_id": None}):
        assert Sessions().continued(None, fields, a_table(), model="auto") is None


@pytest.mark.parametrize("model", ["auto", "math"])
def test_a_turn_continues_where_it_was(model: str) -> None:
    sessions, table = Sessions(), a_table()
    sessions.note("s1", a_turn())
    assert sessions.continued("s1", NEXT, table, model=model) == (a_turn(), table.get("math-0.g1"))


@pytest.mark.parametrize(
    ("session", "fields", "model", "says"),
    [
        (None, NEXT, "auto", "needs the header x-session-id"),
        ("s1", {"previous_response_id": 3}, "auto", "must be a string"),
        ("s1", NEXT, "code", "valid: auto, math"),
    ],
)
def test_turns_that_the_client_must_mend(session: str | None, fields: dict[str, Any], model: str, says: str) -> None:
    sessions = Sessions()
    sessions.note("s1", a_turn())
    with pytest.raises(BadRequestError, match=says) as caught:
        sessions.continued(session, fields, a_table(), model=model)
    assert not isinstance(caught.value, PreviousResponseNotFoundError)


@pytest.mark.parametrize(
    ("session", "table", "says"),
    [
        ("other", a_table(), "no earlier turn"),
        ("s1", ReplicaTable(), "is gone"),
        ("s1", a_table(nonce="another"), "is gone"),
        ("s1", a_table(url="http://127.0.0.1:2"), "is gone"),
        ("s1", a_table(serves={"code": "m"}), "is gone"),
        ("s1", a_table(engine=EngineInfo("transformers")), "keeps no responses"),
    ],
)
def test_turns_that_no_replica_can_continue(session: str, table: ReplicaTable, says: str) -> None:
    sessions = Sessions()
    sessions.note("s1", a_turn())
    with pytest.raises(PreviousResponseNotFoundError, match=f"{says}.*send the whole conversation"):
        sessions.continued(session, NEXT, table, model="auto")


@pytest.mark.parametrize("event", [Event.SAYS_DRAINING, Event.SAYS_STARTING, Event.FAILED])
def test_a_replica_that_is_not_ready_continues_nothing(event: Event) -> None:
    sessions, table = Sessions(), a_table()
    sessions.note("s1", a_turn())
    for replica in table.all():
        table.apply(replica, event)
    with pytest.raises(PreviousResponseNotFoundError):
        sessions.continued("s1", NEXT, table, model="auto")


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_chain_stays_with_the_engine_that_has_it(tmp_path: Path, streaming: bool) -> None:
    """Each of two engines has only its own responses; every turn is answered, with what was said before in mind."""
    run = a_run(tmp_path)
    deployment = a_deployment("math", fallback="math", policy="round_robin")
    async with (
        sim_replica(run, "math-0.g1") as one,
        sim_replica(run, "math-1.g1") as other,
        a_router(run, deployment) as router,
        client_of(router) as client,
    ):
        await ready(router, 2)
        for name in ("s1", "s2", "s3"):
            asks = client.with_options(default_headers={protocol.SESSION_HEADER: name}).responses
            previous: Any = openai.omit
            replicas, reasons, lengths = set(), set(), []
            for model in ("auto", "auto", "math", "auto"):
                if streaming:
                    told = await asks.with_raw_response.create(
                        model=model, input="go on", previous_response_id=previous, stream=True
                    )
                    *_, last = [event async for event in told.parse()]
                    assert last.type == "response.completed"
                    response = last.response
                else:
                    answered = await asks.with_raw_response.create(
                        model=model, input="go on", previous_response_id=previous
                    )
                    told, response = answered, answered.parse()  # type: ignore[assignment]
                assert response.usage is not None
                previous = response.id
                lengths.append(response.usage.input_tokens)
                replicas.add(told.headers["x-replica"])
                reasons.add((model, told.headers["x-route-reason"]))
            assert len(replicas) == 1
            assert reasons == {("auto", "policy"), ("math", "named")}
            assert lengths == sorted(set(lengths))
        assert one.recent.last()
        assert other.recent.last()
        await eventually(lambda: all_gauges_zero(router))


async def test_a_turn_that_cannot_be_continued_is_an_error_to_the_client(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        sim_replica(run, "math-0.g1"),
        sim_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math", "code")) as router,
        client_of(router) as client,
    ):
        await ready(router, 2)
        asks = client.with_options(default_headers=HEADERS).responses
        first = await asks.with_raw_response.create(model="math", input="hi")
        previous = first.parse().id
        with pytest.raises(openai.BadRequestError, match="needs the header x-session-id"):
            await client.responses.create(model="math", input="x", previous_response_id=previous)
        with pytest.raises(openai.BadRequestError, match="valid: auto, math"):
            await asks.create(model="code", input="x", previous_response_id=previous)
        with pytest.raises(openai.BadRequestError, match="'model' is missing"):
            await asks.create(input="x", previous_response_id=previous)
        with pytest.raises(openai.BadRequestError, match="1 to 128"):
            await asks.create(model="math", input="x", extra_headers={protocol.SESSION_HEADER: "a b"})
        with pytest.raises(openai.NotFoundError, match="'resp_0' not found"):  # the engine's own word
            await asks.create(model="math", input="x", previous_response_id="resp_0")
        replica = router.gateway.table.get(first.headers["x-replica"])
        assert replica is not None
        router.gateway.table.apply(replica, Event.SAYS_DRAINING)
        with pytest.raises(openai.BadRequestError, match="is draining; send the whole conversation") as caught:
            await asks.create(model="math", input="x", previous_response_id=previous)
        assert caught.value.code == "previous_response_not_found"
        assert caught.value.param == "previous_response_id"


async def pinned(run: Any, router: Any) -> None:
    """Let session s1 begin at math-0, the only replica so far."""
    await ready(router)
    assert (await post(router, {"model": "math", "input": "hi"}, path=protocol.RESPONSES, **HEADERS))[0] == 200


async def test_a_full_replica_is_waited_for(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", answer, hang, capacity=1) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await pinned(run, router)
        busy = asyncio.create_task(post(router, {"model": "math", "prompt": "x"}, path=protocol.COMPLETIONS))
        await eventually(lambda: len(fake.bodies) == 2)
        async with fake_replica(run, "math-1.g1") as other:
            await ready(router, 2)
            call = asyncio.create_task(post(router, NEXT, path=protocol.RESPONSES, **HEADERS))
            await eventually(lambda: router.gateway.table.waiting("math") == 1)
            fake.go_on.set()
            status, _, headers = await call
            assert (status, headers["x-replica"], headers["x-route-reason"]) == (200, "math-0.g1", "named")
            assert (await busy)[0] == 200
            assert not other.bodies
        await eventually(lambda: all_gauges_zero(router))


async def test_a_waiting_turn_fails_at_once_when_its_replica_is_lost(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", answer, hang, capacity=1) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await pinned(run, router)
        busy = asyncio.create_task(post(router, {"model": "math", "prompt": "x"}, path=protocol.COMPLETIONS))
        await eventually(lambda: len(fake.bodies) == 2)
        call = asyncio.create_task(post(router, NEXT, path=protocol.RESPONSES, **HEADERS))
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        replica = router.gateway.table.get("math-0.g1")
        assert replica is not None
        router.gateway.table.apply(replica, Event.SAYS_DRAINING)
        status, value, _ = await call
        assert (status, value["error"]["code"]) == (400, "previous_response_not_found")
        fake.go_on.set()
        assert (await busy)[0] == 200
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize(
    ("act", "status", "code"),
    [
        (refuse(503, headers={protocol.DRAINING_HEADER: "1"}), 400, "previous_response_not_found"),
        (refuse(500), 500, None),
        (refuse(404), 404, None),
    ],
)
async def test_no_other_replica_takes_the_turn(tmp_path: Path, act: Any, status: int, code: str | None) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1", answer, act), a_router(run, a_deployment("math", probe_s=60)) as router:
        await pinned(run, router)
        async with fake_replica(run, "math-1.g1") as other:
            await ready(router, 2)
            got, value, _ = await post(router, NEXT, path=protocol.RESPONSES, **HEADERS)
            assert (got, value["error"]["code"]) == (status, code)
            assert not other.bodies


async def test_a_session_that_failed_is_not_noted(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1", refuse(400)), a_router(run, a_deployment("math")) as router:
        await ready(router)
        await post(router, {"model": "math", "input": "hi"}, path=protocol.RESPONSES, **HEADERS)
        await post(router, {"model": "math", "prompt": "hi"}, path=protocol.COMPLETIONS, **HEADERS)
        assert len(router.gateway.link.sessions) == 0


async def test_a_withdrawn_replica_takes_its_sessions_along(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        async with fake_replica(run, "math-0.g1"):
            await pinned(run, router)
        registry.withdraw(run.registry, "math-0.g1")
        await eventually(lambda: router.gateway.table.get("math-0.g1") is None)
        _, value, _ = await post(router, NEXT, path=protocol.RESPONSES, **HEADERS)
        assert value["error"]["code"] == "previous_response_not_found"
