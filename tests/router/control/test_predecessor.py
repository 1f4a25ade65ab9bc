"""A router takes over the session turns and the counts of an older one that still serves."""

import asyncio
import time
from pathlib import Path

import pytest

from hpc_router.net import protocol
from hpc_router.net.auth import replica_key
from hpc_router.net.http_client import call, session
from hpc_router.router.control import predecessor
from hpc_router.router.replicas.sessions import Turn
from hpc_router.routing.policy import RouteReason
from hpc_router.state import registry
from hpc_router.state.registry import Record, RecordKind, State
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import NONCE, RunningRouter, a_deployment, a_router, a_run
from tests.support.waiting import eventually

OLD, NEW = "router-0.g1", "router-0.g2"


def turn(replica: str = "math-0.g1", *, at: float | None = None) -> Turn:
    now = time.monotonic()
    return Turn("math", replica, "http://127.0.0.1:1", "n", RouteReason.CLASSIFIED, at=now if at is None else at)


def register(run: RunDir, router: RunningRouter, *, nonce: str = NONCE) -> None:
    registry.publish(run.registry, Record(RecordKind.ROUTER, OLD, router.url, State.READY, {}, nonce=nonce))


async def test_a_new_router_knows_the_turns_and_counts_of_the_old_one(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as old, a_router(run, a_deployment("math"), replica=NEW) as new:
        old.control.workers.sessions.note("first", turn())
        old.control.continuity.absorb({"unready_s": {"math": 3.0}, "handovers": [["math", "overlap", 2]]})
        register(run, old)
        await new.control.take_over()
        found = new.control.workers.sessions.find("first")
        assert found == turn()
        assert new.control.continuity.unready_s("math") == pytest.approx(3, abs=0.5)
        assert new.control.continuity.handovers == {("math", "overlap"): 2}


async def test_turns_that_the_old_router_serves_meanwhile_are_found_when_asked_for(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as old, a_router(run, a_deployment("math"), replica=NEW) as new:
        register(run, old)
        await new.control.take_over()
        old.control.workers.sessions.note("later", turn())
        assert await new.control.workers.find_turn("later") == turn()
        assert await new.control.workers.find_turn("unknown") is None
        old.control.workers.sessions.note("later", turn("math-1.g1"))
        await eventually(lambda: new.control.workers.sessions.find("later") == turn("math-1.g1"))


async def test_a_later_turn_here_is_not_overwritten(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as old, a_router(run, a_deployment("math"), replica=NEW) as new:
        old.control.workers.sessions.note("s", turn(at=time.monotonic() - 60))
        new.control.workers.sessions.note("s", turn("math-1.g1"))
        register(run, old)
        await new.control.take_over()
        assert new.control.workers.sessions.find("s") == turn("math-1.g1")


async def test_all_pages_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predecessor, "PAGE", 10)
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as old, a_router(run, a_deployment("math"), replica=NEW) as new:
        for number in range(35):
            old.control.workers.sessions.note(str(number), turn())
        register(run, old)
        await new.control.take_over()
        assert len(new.control.workers.sessions) == 35


async def test_only_the_routers_own_key_opens_the_handover(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router, session() as client:
        url = router.url + protocol.HANDOVER
        for token in (None, router.token, "x"):
            assert (await call(client, "GET", url, token=token)).status == 401
        assert (await call(client, "GET", url, token=replica_key(run.secret(), NONCE))).status == 200


@pytest.mark.parametrize("nonce", ["another", NONCE])
async def test_a_stranger_at_the_address_hands_nothing_over(tmp_path: Path, nonce: str) -> None:
    """Another process has the port, or the connection is refused: the new router starts without."""
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math"), replica=NEW) as new:
        async with a_router(run, a_deployment("math")) as old:
            old.control.workers.sessions.note("s", turn())
            register(run, old, nonce=nonce)
            if nonce != NONCE:
                await new.control.take_over()
                assert len(new.control.workers.sessions) == 0
        async with asyncio.timeout(predecessor.POLL_S + 10):
            await new.control.take_over()
