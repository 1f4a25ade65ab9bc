"""The simulated engine on several nodes: processes that connect, serve, and end with each other."""

import asyncio
import signal
from asyncio.subprocess import Process
from pathlib import Path

import aiohttp
import pytest

from hpc_router.net.addresses import free_port
from hpc_router.sim.ranks import PEER_LOST
from tests.sim.calls import chat, stream
from tests.sim.support import INSTANT_FLAGS, address, ended, spawned
from tests.support.waiting import eventually


def flags(rank: int, port: int, *, nodes: int = 2) -> list[str]:
    where = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    return ["--nnodes", str(nodes), "--node-rank", str(rank), *where]


async def test_it_serves_once_all_have_met_and_ends_by_signals() -> None:
    port = free_port()
    async with (
        spawned(*flags(1, port, nodes=3)) as one,
        spawned(*flags(2, port, nodes=3)) as two,
        spawned(*flags(0, port, nodes=3), "--announce", *INSTANT_FLAGS) as first,
    ):
        async with aiohttp.ClientSession(await address(first)) as session:
            assert (await stream(session, chat(stream=True)))[-1] == "[DONE]"
        first.send_signal(signal.SIGTERM)
        assert (await ended(first))[0] == 0
        assert [(await ended(process))[0] for process in (one, two)] == [1, 1]  # no signal was sent to them


@pytest.mark.parametrize("lost", [0, 1])
async def test_the_loss_of_one_ends_the_other(lost: int) -> None:
    port = free_port()
    async with spawned(*flags(1, port)) as other, spawned(*flags(0, port), "--announce") as first:
        await address(first)
        ranks: list[Process] = [first, other]
        ranks[lost].kill()
        code, said = await ended(ranks[1 - lost])
    assert (code, said.splitlines()[-1]) == (1, PEER_LOST)


async def test_a_taken_port() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    async with server, spawned(*flags(0, server.sockets[0].getsockname()[1])) as first:
        code, said = await ended(first)
    assert code == 1
    assert "ddress already in use" in said


async def test_waiting_for_the_others_can_be_ended() -> None:
    port = free_port()
    async with spawned(*flags(0, port)) as first:
        await eventually(lambda: listens(port))
        first.send_signal(signal.SIGTERM)
        assert (await ended(first))[0] == 0


def listens(port: int) -> bool:
    """Returns whether a process listens at the port, from /proc/net/tcp, because only ranks may connect."""
    wanted = f"0100007F:{port:04X} 00000000:0000 0A"
    return wanted in Path("/proc/net/tcp").read_text()
