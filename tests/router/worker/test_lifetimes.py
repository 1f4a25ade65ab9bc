"""Requests and the walltimes of replicas, through a whole router."""

import time
from pathlib import Path

from tests.router.fakes import a_deployment, a_router, a_run, fake_replica
from tests.router.support import chat, post, ready
from tests.router.support import relay as relay  # every test holds over the reference as well
from tests.support.waiting import eventually


async def test_a_long_request_avoids_a_replica_near_its_walltimes_end(tmp_path: Path) -> None:
    """By what the expert's last responses took per allowed token."""
    run = a_run(tmp_path)
    now = time.time()
    async with (
        fake_replica(run, "math-0.g1", expires_at=now + 30) as short,
        fake_replica(run, "math-1.g1", expires_at=now + 3600) as long,
        a_router(run, a_deployment("math", pin_bound=None)) as router,
    ):
        await ready(router, 2)
        lifetimes = router.gateway.table.lifetimes
        await eventually(lambda: "math" in lifetimes.expiring)
        assert (await post(router, chat(max_tokens=10)))[0] == 200
        assert lifetimes.expected_s("math", {"max_tokens": 10}) > 0
        for _ in range(20):
            lifetimes.ended("math", 1.0, {"max_tokens": 10})
        before = len(short.bodies)
        for _ in range(10):
            assert (await post(router, chat(max_tokens=1000)))[0] == 200
        assert len(short.bodies) == before
        assert len(long.bodies) >= 10
