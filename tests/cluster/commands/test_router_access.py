"""Verbs send the owner's token only to a router that proves its identity."""

import asyncio
from pathlib import Path

import pytest

from hpc_router.cluster.commands import router_access as access
from hpc_router.cluster.commands.router_access import RouterAccess, router_access
from hpc_router.errors import LaunchError
from hpc_router.state.registry import Record, RecordKind, State
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import NONCE, a_deployment, a_router, a_run


def record_of(url: str, *, nonce: str | None = NONCE) -> Record:
    return Record(RecordKind.ROUTER, "router-0.g1", url, State.READY, {}, nonce=nonce)


async def access_to(run: RunDir) -> RouterAccess:
    return await asyncio.to_thread(router_access, run)


async def test_the_router_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        monkeypatch.setattr(access, "live_router", lambda _: record_of(router.url))
        found = await access_to(run)
        assert found == RouterAccess(record_of(router.url), run.token())
        assert (found.url, found.replica) == (router.url, "router-0.g1")
    with pytest.raises(LaunchError, match=rf"router-0\.g1 at {router.url}: no process answers there"):
        await access_to(run)


@pytest.mark.parametrize(
    ("nonce", "says"), [("ab" * 32, "something else answers there, and was not given the token"), (None, "older")]
)
async def test_another_process_at_the_routers_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nonce: str | None, says: str
) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        monkeypatch.setattr(access, "live_router", lambda _: record_of(router.url, nonce=nonce))
        with pytest.raises(LaunchError, match=rf"router-0\.g1 at {router.url}: .*{says}"):
            await access_to(run)


def test_no_router(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no router serves .*; `hpc-router up --run"):
        router_access(a_run(tmp_path))
