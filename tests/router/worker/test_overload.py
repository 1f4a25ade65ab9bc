"""More than may come in: who waits, who is refused, and when he is told to come again."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from hpc_router.router.control.replica_stats import totals_by_replica
from hpc_router.routing.policy import Decision, RouteReason
from hpc_router.state.atomic_files import replace_json
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, answer, fake_replica, hang, refuse
from tests.router.support import all_gauges_zero, chat, client_of, post, ready
from tests.support.waiting import eventually


async def test_the_queue_is_bounded_and_tells_when_to_come_again(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        a_router(run, a_deployment("math", max_waiting=2)) as router,
    ):
        await ready(router)
        tasks = [asyncio.create_task(post(router, chat())) for _ in range(3)]
        await eventually(lambda: router.gateway.table.waiting("math") == 2)
        status, value, headers = await post(router, chat())
        assert (status, value["error"]["code"]) == (429, "overloaded")
        assert int(headers["retry-after"]) >= 1
        assert router.gateway.table.waiting("math") == 2
        told = (await get(router, "/status"))["experts"]["math"]
        assert (told["waiting"], told["max_waiting"], told["in_flight"]) == (2, 2, 1)
        lines = await metrics(router)
        assert 'hpc_router_requests_waiting_bound{expert="math"} 2.0' in lines
        assert 'hpc_router_expert_requests_in_flight{expert="math"} 1.0' in lines
        assert 'hpc_router_replica_capacity{replica="math-0.g1"} 1.0' in lines
        fake.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(*tasks)] == [200] * 3
        await eventually(lambda: all_gauges_zero(router))
        assert 'hpc_router_queue_seconds_count{expert="math"} 2.0' in await metrics(router)


async def test_a_wait_in_the_queue_does_not_count_as_the_replicas_time(tmp_path: Path) -> None:
    """A fresh replica that serves a queue would otherwise seem slow."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        a_router(run, a_deployment("math", max_waiting=2)) as router,
    ):
        await ready(router)
        tasks = [asyncio.create_task(post(router, chat())) for _ in range(2)]
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        fake.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(*tasks)] == [200] * 2
        await eventually(lambda: all_gauges_zero(router))
    dumped = router.gateway.dispatcher.metrics.dump()
    ((_, counts, first_byte_s),) = dumped["first_byte"]
    ((_, _, queued_s),) = dumped["queued"]
    answered, seconds, _ = totals_by_replica(dumped)["math-0.g1"]
    assert answered == sum(counts) == 2
    assert 0 < seconds <= first_byte_s - queued_s


async def test_who_waits_for_nobody_is_told_that_there_is_nobody(tmp_path: Path) -> None:
    """503 and not 429: it is not that too many ask."""
    async with a_router(a_run(tmp_path), a_deployment("math", max_waiting=1)) as router:
        waiting = asyncio.create_task(post(router, chat()))
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        status, value, headers = await post(router, chat())
        assert (status, value["error"]["code"]) == (503, "unavailable")
        assert int(headers["retry-after"]) >= 1
        waiting.cancel()


async def test_an_expert_has_a_bound_over_all_its_replicas(tmp_path: Path) -> None:
    run, deployment = a_run(tmp_path), a_deployment("math")
    deployment.experts["math"].max_in_flight = 3
    async with (
        fake_replica(run, "math-0.g1", hang) as one,
        fake_replica(run, "math-1.g1", hang) as other,
        a_router(run, deployment) as router,
    ):
        await ready(router, 2)
        tasks = [asyncio.create_task(post(router, chat())) for _ in range(5)]
        await eventually(lambda: router.gateway.table.waiting("math") == 2)
        assert router.gateway.table.load("math") == 3
        assert (await get(router, "/status"))["experts"]["math"]["max_in_flight"] == 3
        assert 'hpc_router_expert_requests_bound{expert="math"} 3.0' in await metrics(router)
        one.go_on.set()
        other.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(*tasks)] == [200] * 5
        await eventually(lambda: all_gauges_zero(router))


async def test_a_burst_does_not_pass_the_routers_bound(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=100) as fake,
        a_router(run, a_deployment("math", max_in_flight=4)) as router,
    ):
        await ready(router)
        tasks = [asyncio.create_task(post(router, chat())) for _ in range(12)]
        await eventually(lambda: sum(task.done() for task in tasks) == 8)
        await eventually(lambda: len(fake.bodies) == 4)
        assert router.gateway.in_flight.count == 4
        fake.go_on.set()
        seen = sorted(status for status, _, _ in await asyncio.gather(*tasks))
        assert seen == [200] * 4 + [429] * 8
        await eventually(lambda: all_gauges_zero(router))


class Torn:
    """A policy that is nearly as sure of one expert as of the other."""

    version = None
    weighs_load = False

    def select(self, text: str, **_: Any) -> Decision:
        return Decision("math", RouteReason.CLASSIFIED, "c", 0.5, 0.1, "code")

    def order(self, decision: Decision) -> tuple[str, ...]:
        return ("math", "code")


async def both(tmp_path: Path, spill_per_s: float | None, then: Callable[[RunningRouter], Any]) -> None:
    run, deployment = a_run(tmp_path), a_deployment("math", "code")
    deployment.policy.spill_per_s = spill_per_s
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        fake_replica(run, "code-0.g1", answer),
        a_router(run, deployment) as router,
    ):
        router.gateway.routing.policy = Torn()  # type: ignore[assignment]
        await ready(router, 2)
        held = asyncio.create_task(post(router, chat("math")))
        await fake.arrived.wait()
        await then(router)
        fake.go_on.set()
        assert (await held)[0] == 200
        await eventually(lambda: all_gauges_zero(router))


async def test_auto_waits_for_its_expert_and_spills_only_where_asked(tmp_path: Path) -> None:
    """A second of waiting is worth so much score: at 0.04 two seconds are not worth 0.1, at 0.06 they are."""

    async def waits(router: RunningRouter) -> None:
        asked = asyncio.create_task(post(router, chat("auto")))
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        assert router.gateway.table.waiting("code") == 0
        asked.cancel()

    async def spills(router: RunningRouter) -> None:
        status, _, headers = await post(router, chat("auto"))
        assert (status, headers["x-expert"], headers["x-route-reason"]) == (200, "code", "spilled")

    for at, (spill_per_s, then) in enumerate([(None, waits), (0.04, waits), (0.06, spills)]):
        (tmp_path / str(at)).mkdir()
        await both(tmp_path / str(at), spill_per_s, then)


async def test_an_answer_that_a_draining_router_owes_closes_its_connection(tmp_path: Path) -> None:
    """However it is served: what began before the drain ends with it."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang) as fake,
        a_router(run, a_deployment("math")) as router,
        client_of(router),
    ):
        await ready(router)
        await router.warm()
        asked = asyncio.create_task(post(router, chat()))
        await fake.arrived.wait()
        router.gateway.draining = True
        fake.go_on.set()
        status, _, headers = await asked
        assert (status, headers.get("connection")) == (200, "close")


async def get(router: RunningRouter, path: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(router.url + path, headers=router.headers) as response:
        return await response.json() if path != "/metrics" else await response.text()


async def metrics(router: RunningRouter) -> list[str]:
    return str(await get(router, "/metrics")).splitlines()


async def test_the_time_to_come_again_is_less_than_a_minute(tmp_path: Path) -> None:
    """However long the queue is expected to take, and whatever an engine says itself."""
    run = a_run(tmp_path)
    far = {"retry-after": "3600"}
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1),
        fake_replica(run, "law-0.g1", refuse(429, headers=far)),
        a_router(run, a_deployment("math", "law", max_waiting=1)) as router,
    ):
        await ready(router, 2)
        tasks = [asyncio.create_task(post(router, chat())) for _ in range(2)]
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        since = router.gateway.table.clock()
        router.gateway.table.clock = lambda: since + 3600
        assert (await post(router, chat()))[2]["retry-after"] == "59"
        assert (await post(router, chat("law")))[2]["retry-after"] == "59"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_retry_after_is_the_time_until_the_expert_is_expected_to_be_ready(tmp_path: Path) -> None:
    """The control loop's forecast; without one, and for one that is over, the usual pause."""
    run = a_run(tmp_path)
    replace_json(run.forecast_json, {"at": 0, "experts": {"math": {"ready_at": time.time() + 45}}, "handovers": []})
    async with a_router(run, a_deployment("math", "code", queue_timeout_s=0.05, answer_timeout_s=0.05)) as router:
        table = router.gateway.table
        await eventually(lambda: "math" in table.forecasts)
        status, _, headers = await post(router, chat())
        assert (status, 40 <= int(headers["retry-after"]) <= 45) == (503, True)
        usual = (await post(router, chat("code")))[2]["retry-after"]
        assert int(usual) < 40
        replace_json(run.forecast_json, {"at": 1, "experts": {}, "handovers": []})
        await eventually(lambda: not table.forecasts)
        assert (await post(router, chat()))[2]["retry-after"] == usual
