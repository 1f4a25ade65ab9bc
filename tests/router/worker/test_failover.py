"""What becomes of a request whose replica fails before the first byte, and of that replica."""

import asyncio
import errno
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from hpc_router.errors import UpstreamConnectError
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.router.replicas.replica import RoutingState
from tests.router.fakes import Act, a_deployment, a_router, a_run, answer, fake_replica, refuse, reset, stream
from tests.router.support import all_gauges_zero, chat, post, ready, standing, statuses
from tests.support.waiting import eventually


async def test_the_only_replica_is_asked_again_once_it_has_been_probed(tmp_path: Path) -> None:
    """Its connection broke, so nobody knows whether it lives: its probe says so, and there is nobody else."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", reset, answer) as fake,
        a_router(run, a_deployment("math", probe_s=60)) as router,
    ):
        await ready(router)
        assert await statuses(router, 1) == [200]
        assert len(fake.bodies) == 2
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(
    "act", [reset, stream([b"data: {"], then="reset"), stream([b"data: {"])], ids=["nothing", "reset", "cut"]
)
async def test_a_response_that_breaks_twice_before_it_begins_is_not_generated_a_third_time(
    tmp_path: Path, act: Act, replicas: int
) -> None:
    """A proxy in front of an endpoint may cut each long answer, and each attempt costs a generation."""
    run = a_run(tmp_path)
    async with AsyncExitStack() as stack:
        names = [f"math-{number}.g1" for number in range(replicas)]
        fakes = [await stack.enter_async_context(fake_replica(run, name, act)) for name in names]
        router = await stack.enter_async_context(a_router(run, a_deployment("math", probe_s=60)))
        await ready(router, replicas)
        status, body, _ = await post(router, chat(stream=True))
        assert (status, body["error"]["code"]) == (502, "replica_failed")
        assert "failed before it had finished: " in body["error"]["message"]
        assert sum(len(fake.bodies) for fake in fakes) == 2
        await eventually(lambda: all_gauges_zero(router))


async def test_errors_in_a_row_put_a_replica_out_until_its_time_is_over(tmp_path: Path) -> None:
    """No client sees them; its agent's word that it is ready does not count before, and brings it back after."""
    run = a_run(tmp_path)
    ill = [refuse(500), refuse(502), refuse(500)]
    config: dict[str, Any] = {"eject_errors": 3, "eject_s": 5.0, "pin_bound": None}
    async with (
        fake_replica(run, "math-0.g1", *ill, answer) as sick,
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math", **config)) as router,
    ):
        await ready(router, 2)
        while standing(router, "math-0.g1") is RoutingState.READY:
            assert await statuses(router, 1) == [200]
        assert len(sick.bodies) == 3
        assert standing(router, "math-0.g1") is RoutingState.EJECTED
        assert "500" in str(router.gateway.table.get("math-0.g1").trouble)  # type: ignore[union-attr]
        assert await statuses(router, 3) == [200] * 3
        assert len(sick.bodies) == 3
        await eventually(lambda: standing(router, "math-0.g1") is RoutingState.READY)
        while len(sick.bodies) == 3:
            assert await statuses(router, 1) == [200]


@pytest.mark.parametrize(("fault", "seen"), [(reset, ": "), (refuse(500), " answered 500")])
async def test_what_is_reported_of_a_failed_request_names_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, seen: str
) -> None:
    run, reported = a_run(tmp_path), []
    async with (
        fake_replica(run, "math-0.g1", fault) as sick,
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math", pin_bound=None)) as router,
    ):
        await ready(router, 2)
        monkeypatch.setattr(
            type(router.gateway.dispatcher.health), "request_failed", lambda *told: reported.append(told[1:])
        )
        while not reported:
            assert await statuses(router, 1) == [200]
    replica, trouble = reported[0]
    assert replica.name == "math-0.g1"
    assert trouble.startswith(f"{sick.url}{seen}")


async def test_an_error_that_two_replicas_agree_on_belongs_to_the_request(tmp_path: Path) -> None:
    """It is passed on after the second, however many there are, and none of them is put out for it."""
    run = a_run(tmp_path)
    config: dict[str, Any] = {"eject_errors": 1, "eject_share": 1.0, "pin_bound": None}
    async with (
        fake_replica(run, "math-0.g1", refuse(500)) as first,
        fake_replica(run, "math-1.g1", refuse(500)) as second,
        fake_replica(run, "math-2.g1", refuse(500)) as third,
        a_router(run, a_deployment("math", **config)) as router,
    ):
        await ready(router, 3)
        assert await statuses(router, 6) == [500] * 6
        assert sum(len(fake.bodies) for fake in (first, second, third)) == 12
        told = await router.control.status()
        assert [one["state"] for one in told["experts"]["math"]["replicas"]] == ["ready"] * 3
        assert [one["sick"] for one in told["experts"]["math"]["replicas"]] == [None] * 3


async def test_an_error_of_the_only_replica_is_no_mark_on_it(tmp_path: Path) -> None:
    """Nor is what another expert makes of the same request a difference between replicas."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", refuse(500)) as fake,
        fake_replica(run, "law-0.g1"),
        a_router(run, a_deployment("math", "law", policy="round_robin", fallback="law", eject_errors=1)) as router,
    ):
        await ready(router, 2)
        assert (await post(router, chat("math")))[0] == 500
        while len(fake.bodies) < 2:
            assert (await post(router, chat("auto")))[0] == 200
        replica = router.gateway.table.get("math-0.g1")
        assert replica is not None
        assert (replica.state, replica.recent_error) == (RoutingState.READY, False)


async def test_only_a_good_answer_of_another_replica_is_a_mark(tmp_path: Path) -> None:
    """Different errors are not: neither of the two has shown that the request can be answered."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", refuse(500), answer) as one,
        fake_replica(run, "math-1.g1", refuse(502), answer),
        a_router(run, a_deployment("math", eject_errors=1, pin_bound=None)) as router,
    ):
        await ready(router, 2)
        assert (await statuses(router, 1))[0] in (500, 502)
        assert {r.recent_error for r in router.gateway.table.all()} == {False}
        one.acts.appendleft(refuse(500))
        while len(one.acts) > 1:
            assert await statuses(router, 1) == [200]
        assert standing(router, "math-0.g1") is RoutingState.EJECTED
        assert standing(router, "math-1.g1") is RoutingState.READY


async def test_without_a_budget_a_failure_is_passed_on(tmp_path: Path) -> None:
    """And counted; what a lost replica leaves behind goes elsewhere all the same."""
    run = a_run(tmp_path)
    config: dict[str, Any] = {"retry_share": 0, "retry_least_per_s": 0.01, "pin_bound": None, "eject_errors": 100}
    async with (
        fake_replica(run, "math-0.g1", refuse(500)) as sick,
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math", **config)) as router,
    ):
        await ready(router, 2)
        seen: list[int] = []
        async with asyncio.timeout(60):
            while len(sick.bodies) < 4:
                seen += await statuses(router, 1)
        assert seen.count(500) == len(sick.bodies) - 1, "one retry is within 0.01 per second for 10 s, rounded up"
        assert seen.count(200) == len(seen) - seen.count(500)
        refused = seen.count(500)
        assert refused > 0
        assert f"hpc_router_retries_refused_total {refused}.0" in router.gateway.metrics.exposition(()).decode()


async def test_a_lack_of_descriptors_here_is_no_replicas_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_descriptor(*_: Any, **__: Any) -> None:
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError as error:
            raise UpstreamConnectError("cannot connect to the replica") from error

    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1"),
        a_router(run, a_deployment("math", queue_timeout_s=0.3, probe_s=60)) as router,
    ):
        await ready(router)
        with monkeypatch.context() as patch:
            patch.setattr(UpstreamClient, "connect", no_descriptor)
            assert await statuses(router, 1) == [503]
        assert standing(router, "math-0.g1") is RoutingState.READY
        assert await statuses(router, 1) == [200]


async def test_many_requests_survive_the_loss_of_a_replica_at_once(tmp_path: Path) -> None:
    """However small the budget: its connections break together, before anybody knows that it is gone."""
    run = a_run(tmp_path)
    config: dict[str, Any] = {"retry_share": 0, "retry_least_per_s": 0.01}
    async with (
        fake_replica(run, "math-1.g1", capacity=100),
        a_router(run, a_deployment("math", **config)) as router,
    ):
        async with fake_replica(run, "math-0.g1", capacity=100) as gone:
            await ready(router, 2)
            record = router.gateway.table.get("math-0.g1")
            assert record is not None
            gone.silent = True
            tasks = [asyncio.create_task(post(router, chat(messages=said(n)))) for n in range(30)]
            await eventually(lambda: record.in_flight >= 8)
        assert [status for status, _, _ in await asyncio.gather(*tasks)] == [200] * 30
        await eventually(lambda: all_gauges_zero(router))


def said(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"topic {number}"}]
