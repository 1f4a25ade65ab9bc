"""Classes of requests: the header, the engine's priority, and what is shed under overload."""

import asyncio
import json
from pathlib import Path
from typing import Any

import anthropic
import pytest

from hpc_router.config.schema import ClassConfig, ClassesConfig
from hpc_router.router.worker.gateway import LONG_BODY_BYTES
from hpc_router.state.registry import EngineInfo
from hpc_router.state.run_directory import RunDir
from hpc_router.state.user_tokens import create_token
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, answer, fake_replica, hang
from tests.router.support import CHAT, all_gauges_zero, chat, post, ready, session
from tests.router.support import relay as relay
from tests.support.waiting import eventually

BATCH = {"x-priority": "batch"}
PRIORITY = EngineInfo(kind="fake", priority=True)


async def exposition(router: RunningRouter) -> str:
    async with session() as s, s.get(f"{router.url}/metrics", headers=router.headers) as response:
        return await response.text()


def raw(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


async def test_the_header_is_for_the_router_only(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        for name in ("batch", "interactive", "Batch", ""):
            for _ in range(3):
                assert (await post(router, chat(), **{"x-priority": name}))[0] == 200
        assert all("x-priority" not in headers for headers in fake.headers)
        assert set(fake.bodies) == {raw(chat())}, "an engine that ignores it gets the client's bytes"


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
async def test_an_unknown_class_is_refused(tmp_path: Path, path: str) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        for _ in range(3):
            status, value, _ = await post(router, chat(), path=path, **{"x-priority": "batsh"})
            assert status == 400
            assert "did you mean 'batch'? (valid: batch, interactive)" in value["error"]["message"]
        assert not fake.bodies


@pytest.mark.parametrize("text", ["2+2?", "x" * LONG_BODY_BYTES])
async def test_the_class_becomes_the_priority_of_an_engine_that_obeys_it(tmp_path: Path, text: str) -> None:
    """The value of the client is replaced, wherever it is, and only that of the outer object."""
    run = a_run(tmp_path)
    bodies = [
        chat(text=text),
        chat(text=text, priority=-5),
        {"priority": "high", **chat(text=text)},
        chat(text=text, extra={"priority": 7}),
        raw(chat(text=text))[:-1] + b', "prior\\u0069ty" : [1, 2] }  ',
        b'{"pri\\u006frity":null,' + raw(chat(text=text))[1:],
    ]
    async with (
        fake_replica(run, "math-0.g1", engine=PRIORITY) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        for body in bodies:
            for headers, priority in (({}, 0), (BATCH, 1)):
                fake.bodies.clear()
                assert (await post(router, body, **headers))[0] == 200
                (sent,) = fake.bodies
                given = json.loads(raw(body))
                if "priority" in given or priority:
                    assert json.loads(sent) == given | {"priority": priority}
                else:
                    assert sent == raw(body)


async def test_the_priority_is_set_beside_another_model_name(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    deployment = a_deployment("math", fallback="math")
    async with (
        fake_replica(run, "math-0.g1", models=("other",), engine=PRIORITY) as fake,
        a_router(run, deployment) as router,
    ):
        await ready(router)
        for body in (chat("auto"), {"priority": 3, **chat("auto", priority_note="priority")}):
            fake.bodies.clear()
            assert (await post(router, body, **BATCH))[0] == 200
            assert json.loads(fake.bodies[0]) == body | {"model": "other", "priority": 1}


async def test_two_priorities_in_a_body_are_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1", engine=PRIORITY) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        status, value, _ = await post(router, b'{"priority":1,"priority":2,' + raw(chat())[1:])
        assert (status, fake.bodies) == (400, [])
        assert "'priority' occurs twice" in value["error"]["message"]
        await eventually(lambda: all_gauges_zero(router))


async def as_user(router: RunningRouter, token: str, **headers: str) -> Any:
    return await post(router, chat(), authorization=f"Bearer {token}", **headers)


async def waiting(router: RunningRouter, count: int) -> None:
    await eventually(lambda: router.gateway.table.waiting("math") == count)


@pytest.mark.parametrize("limited", [False, True])
async def test_users_take_turns(tmp_path: Path, limited: bool) -> None:
    """The owner's flood is one user's, as that of a token is."""
    run = a_run(tmp_path)
    made = [create_token(run, name)[1] for name in ("alice", "bob")]
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        await eventually(lambda: len(router.gateway.users) == 2)
        first = asyncio.create_task(as_user(router, made[0]))
        await eventually(lambda: len(fake.bodies) == 1)
        flood, order = [], list[str]()

        async def send(name: str, request: Any) -> None:
            assert (await request)[0] == 200
            order.append(name)

        for number in range(6):
            request = as_user(router, made[0]) if limited else post(router, chat())
            flood.append(asyncio.create_task(send("flood", request)))
            await waiting(router, number + 1)
        flood.append(asyncio.create_task(send("bob", as_user(router, made[1]))))
        await waiting(router, 7)
        fake.go_on.set()
        await asyncio.gather(first, *flood)
        assert order.index("bob") <= 1
        await eventually(lambda: all_gauges_zero(router))


async def test_batch_requests_wait_for_interactive_ones(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        order: list[str] = []

        async def send(name: str, **headers: str) -> None:
            assert (await post(router, chat(), **headers))[0] == 200
            order.append(name)

        tasks = [asyncio.create_task(send("first"))]
        await eventually(lambda: len(fake.bodies) == 1)
        for number, name in enumerate(("batch", "batch", "interactive", "interactive"), start=1):
            tasks.append(asyncio.create_task(send(name, **{"x-priority": name})))
            await waiting(router, number)
        lines = await exposition(router)
        assert 'hpc_router_class_requests_waiting{class="batch",expert="math"} 2.0' in lines
        assert 'hpc_router_class_requests_waiting{class="interactive",expert="math"} 2.0' in lines
        queues = (await router.control.overview())["experts"][0]["queues"]
        assert [(name, queue["waiting"]) for name, queue in queues.items()] == [("interactive", 2), ("batch", 2)]
        assert queues["batch"]["oldest_s"] >= queues["interactive"]["oldest_s"] >= 0
        fake.go_on.set()
        await asyncio.gather(*tasks)
        assert order == ["first", "interactive", "interactive", "batch", "batch"]
        await eventually(lambda: all_gauges_zero(router))


async def test_a_full_queue_sheds_batch_requests_first(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        a_router(run, a_deployment("math", max_waiting=2)) as router,
    ):
        await ready(router)
        first = asyncio.create_task(post(router, chat()))
        await eventually(lambda: len(fake.bodies) == 1)
        batch = asyncio.create_task(post(router, chat(), **BATCH))
        await waiting(router, 1)
        kept = asyncio.create_task(post(router, chat()))
        await waiting(router, 2)
        status, value, headers = await post(router, chat(), **BATCH)
        assert (status, value["error"]["code"]) == (503, "shed")
        assert "router.max_waiting" in value["error"]["message"]
        assert int(headers["retry-after"]) >= 1
        other = asyncio.create_task(post(router, chat()))
        assert (await batch)[:2] == (503, value), "the newcomer of the higher class has its place"
        assert (await post(router, chat()))[0] == 429
        async with anthropic.AsyncAnthropic(base_url=router.url, api_key=router.token, max_retries=0) as client:
            with pytest.raises(anthropic.InternalServerError, match="batch are shed first"):
                await client.messages.create(
                    model="math", max_tokens=5, messages=[{"role": "user", "content": "x"}], extra_headers=BATCH
                )
        assert 'hpc_router_requests_shed_total{limit="max_waiting"} 3.0' in await exposition(router)
        fake.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(first, kept, other)] == [200] * 3
        await eventually(lambda: all_gauges_zero(router))


async def test_the_routers_limit_sheds_waiting_batch_requests_first(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        a_router(run, a_deployment("math", max_in_flight=2)) as router,
    ):
        await ready(router)
        first = asyncio.create_task(post(router, chat()))
        await eventually(lambda: len(fake.bodies) == 1)
        batch = asyncio.create_task(post(router, chat(), **BATCH))
        await waiting(router, 1)
        status, value, _ = await post(router, chat(), **BATCH)
        assert (status, value["error"]["code"]) == (503, "shed")
        kept = asyncio.create_task(post(router, chat()))
        status, value, _ = await batch
        assert (status, value["error"]["code"]) == (503, "shed")
        assert "router.max_in_flight" in value["error"]["message"]
        assert (await post(router, chat()))[0] == 429
        fake.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(first, kept)] == [200] * 2
        await eventually(lambda: all_gauges_zero(router))


def classes(**batch: Any) -> ClassesConfig:
    return ClassesConfig(interactive=ClassConfig(weight=10), batch=ClassConfig(**batch))


async def test_a_limit_of_the_batch_class_leaves_places_to_interactive_requests(tmp_path: Path) -> None:
    run: RunDir = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, hang, answer, hang, capacity=3) as fake,
        a_router(run, a_deployment("math", classes=classes(max_in_flight=2))) as router,
    ):
        await ready(router)
        tasks = [asyncio.create_task(post(router, chat(), **BATCH)) for _ in range(4)]
        await waiting(router, 2)
        await eventually(lambda: len(fake.bodies) == 2)
        assert (await post(router, chat()))[0] == 200
        fake.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(*tasks)] == [200] * 4
        await eventually(lambda: all_gauges_zero(router))
        assert router.gateway.table.class_in_flight("math", 1) == 0  # type: ignore[arg-type]
