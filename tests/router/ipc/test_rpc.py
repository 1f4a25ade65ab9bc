"""Notifications and calls between two processes: in order, answered, and failed when the peer ends."""

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

import pytest
import uvloop

from hpc_router.router.control.process import ControlProcess
from hpc_router.router.ipc.messages import Call, Message
from hpc_router.router.ipc.rpc import ChannelClosedError, Handler, RpcPeer
from hpc_router.router.ipc.shared_counters import Counters
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.sessions import Sessions
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker.control_client import ControlClient
from hpc_router.state.io_thread import FileThread
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import a_deployment, a_run

LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Note(Message):
    text: str


@dataclass(frozen=True, slots=True)
class CountNotes(Call[int]):
    text: str


async def pair(here: Handler, there: Handler) -> tuple[RpcPeer, RpcPeer]:
    a, b = socket.socketpair()
    one, other = RpcPeer(here, lambda: None), RpcPeer(there, lambda: None)
    await one.open(a)
    await other.open(b)
    return one, other


async def test_notifications_come_in_order_and_calls_are_answered() -> None:
    received: list[Message] = []

    def handle(message: Message) -> int:
        received.append(message)
        return len(received)

    one, other = await pair(lambda _: None, handle)
    for text in ("a" * 200_000, "b"):
        one.notify(Note(text))
    assert await one.call(CountNotes("c"), timeout_s=LIMIT_S) == 3
    assert received == [Note("a" * 200_000), Note("b"), CountNotes("c")]
    other.close()
    with pytest.raises(ChannelClosedError):
        await one.call(CountNotes("d"), timeout_s=LIMIT_S)
    one.close()


@pytest.mark.parametrize("run_in", [asyncio.run, uvloop.run])
def test_a_call_to_a_dead_peer_fails_after_the_owner_was_notified(run_in: Any) -> None:
    """Else the owner would keep the channel for good, and not wait for the peer's successor."""
    run_in(_call_a_dead_peer())


async def _call_a_dead_peer() -> None:
    ended: list[str] = []
    here, there = socket.socketpair()
    one = RpcPeer(lambda _: None, lambda: ended.append("ended"))
    await one.open(here)
    there.close()
    one.notify(Note("x"))  # finds the connection closed
    with pytest.raises(ChannelClosedError, match="has ended"):
        await one.call(CountNotes("x"), timeout_s=LIMIT_S)
    assert ended == ["ended"]


async def test_a_failed_call_fails_at_the_caller() -> None:
    def fail(message: Message) -> Any:
        raise ValueError(message)

    one, other = await pair(lambda _: None, fail)
    with pytest.raises(ChannelClosedError, match=r"ValueError: CountNotes\(text='what'\)"):
        await one.call(CountNotes("what"), timeout_s=LIMIT_S)
    one.close()
    other.close()


@pytest.mark.parametrize("run_in", [asyncio.run, uvloop.run])
def test_a_hello_that_comes_before_open_returns_gets_its_snapshot(run_in: Any, tmp_path: Any) -> None:
    """A message may be received before the task that opened the channel continues."""
    run = a_run(tmp_path)
    for _ in range(3):
        run_in(_hello_comes_early(run))


async def _hello_comes_early(run: RunDir) -> None:
    files = FileThread("test")
    counters, deployment = Counters(workers=1), a_deployment("math")
    control = ControlProcess(run, deployment, deployment, counters, files, "router-0.g1", started_at=0, artefact=None)
    here, there = socket.socketpair()
    link = ControlClient(ReplicaTable(cells=counters.row(0)), Sessions(), Metrics())
    async with control.watching({}):
        await control.workers.served(timeout_s=0)
        await link.attach(there)
        await control.workers.attach(0, here)
        async with asyncio.timeout(LIMIT_S):
            await link.informed.wait()
    link.close()
    await asyncio.sleep(0)
    files.close(timeout_s=5)
