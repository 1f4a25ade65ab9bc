"""Messages between processes: as told, whenever they come."""

import asyncio
import socket
from typing import Any

import pytest
import uvloop

from hpc_router.router.control.process import ControlProcess
from hpc_router.router.ipc.rpc import ChannelClosedError, RpcPeer
from hpc_router.router.ipc.shared_counters import Counters
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.sessions import Sessions
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker.control_client import ControlClient
from hpc_router.state.io_thread import FileThread
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import a_deployment, a_run

LIMIT_S = 10.0


async def pair(here: Any, there: Any) -> tuple[RpcPeer, RpcPeer]:
    a, b = socket.socketpair()
    one, other = RpcPeer(here, lambda: None), RpcPeer(there, lambda: None)
    await one.open(a)
    await other.open(b)
    return one, other


async def test_what_is_told_comes_in_order_and_what_is_asked_is_answered() -> None:
    told: list[Any] = []

    def note(kind: str, value: Any) -> Any:
        told.append(value)
        return len(told)

    one, other = await pair(lambda *_: None, note)
    for value in ("a" * 200_000, {"b": [1, None]}):
        one.tell("note", value)
    assert await one.ask("note", 3, limit_s=LIMIT_S) == 3
    assert told == ["a" * 200_000, {"b": [1, None]}, 3]
    other.close()
    with pytest.raises(ChannelClosedError):
        await one.ask("note", 4, limit_s=LIMIT_S)
    one.close()


@pytest.mark.parametrize("run_in", [asyncio.run, uvloop.run])
def test_who_asks_a_peer_that_was_found_dead_hears_it_after_the_owner(run_in: Any) -> None:
    """Else the owner would still hold the channel for good, and not wait for the peer's successor."""
    run_in(_asked_of_the_dead())


async def _asked_of_the_dead() -> None:
    ended: list[str] = []
    here, there = socket.socketpair()
    one = RpcPeer(lambda *_: None, lambda: ended.append("ended"))
    await one.open(here)
    there.close()
    one.tell("note")  # finds that nobody is there
    with pytest.raises(ChannelClosedError, match="has ended"):
        await one.ask("note", limit_s=LIMIT_S)
    assert ended == ["ended"]


async def test_what_cannot_be_answered_is_told_to_who_asked() -> None:
    def fail(kind: str, value: Any) -> Any:
        raise ValueError(kind)

    one, other = await pair(lambda *_: None, fail)
    with pytest.raises(ChannelClosedError, match="ValueError: what"):
        await one.ask("what", limit_s=LIMIT_S)
    one.close()
    other.close()


@pytest.mark.parametrize("run_in", [asyncio.run, uvloop.run])
def test_a_hello_that_is_there_before_the_way_is_open_gets_its_view(run_in: Any, tmp_path: Any) -> None:
    """In the loop that serves, a message may come before whoever opened the channel goes on."""
    run = a_run(tmp_path)
    for _ in range(3):
        run_in(_greeted_early(run))


async def _greeted_early(run: RunDir) -> None:
    files = FileThread("test")
    counters, deployment = Counters(workers=1), a_deployment("math")
    control = ControlProcess(run, deployment, deployment, counters, files, "router-0.g1", started_at=0, artefact=None)
    here, there = socket.socketpair()
    link = ControlClient(ReplicaTable(cells=counters.row(0)), Sessions(), Metrics())
    async with control.watching({}):
        await control.served(limit_s=0)
        await link.attach(there)
        await control.attach(0, here)
        async with asyncio.timeout(LIMIT_S):
            await link.informed.wait()
    link.close()
    await asyncio.sleep(0)
    files.close(timeout_s=5)
