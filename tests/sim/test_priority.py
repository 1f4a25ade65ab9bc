"""The order in which the simulated engine admits waiting requests."""

import asyncio
from dataclasses import replace
from typing import Literal

import pytest

from hpc_router.sim.admission import Places
from hpc_router.sim.server import SimServer
from tests.sim.calls import INSTANT, JsonObject, chat, client, post, stream, until

VALUES = (1, 1, 0, -3, 0)


@pytest.mark.parametrize(("policy", "order"), [("fcfs", [0, 1, 2, 3, 4]), ("priority", [3, 2, 4, 0, 1])])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", chat(max_tokens=1)),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/embeddings", {"input": "x"}),
    ],
)
async def test_waiting_requests_run_in_the_order_of_the_policy(
    path: str, fields: JsonObject, policy: Literal["fcfs", "priority"], order: list[int]
) -> None:
    config = replace(INSTANT, capacity=1, scheduling_policy=policy)
    async with SimServer(config) as engine, client(engine) as session:
        holder = asyncio.create_task(stream(session, chat(stream=True, sim_fault={"kind": "hang"})))
        await until(lambda: engine.counts.running == 1)
        ended: list[int] = []

        async def send(number: int, priority: int) -> None:
            assert (await post(session, path, fields | {"priority": priority}))[0] == 200
            ended.append(number)

        tasks = []
        for number, priority in enumerate(VALUES):
            tasks.append(asyncio.create_task(send(number, priority)))
            await until(lambda number=number: engine.counts.waiting == number + 1)  # type: ignore[misc]
        holder.cancel()
        await asyncio.gather(*tasks)
        assert ended == order
        status, value = await post(session, path, fields | {"priority": "high"})
        assert status == 400
        assert "'priority' must be an integer" in str(value)


async def test_a_place_granted_to_a_request_that_leaves_goes_to_the_next() -> None:
    places = Places(1)
    await places.acquire(0)
    first, second = (asyncio.create_task(places.acquire(0)) for _ in range(2))
    await asyncio.sleep(0)
    places.release()
    first.cancel()
    await second
    assert first.cancelled()
    gone = asyncio.create_task(places.acquire(0))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    places.release()
    await places.acquire(0)
