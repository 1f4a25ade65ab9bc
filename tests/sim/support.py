"""The simulated engine as a process, and the type of the fixture that starts one in the test's process."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp

from hpc_router.sim.config import SimConfig
from hpc_router.sim.server import SimServer
from tests.sim.calls import GUARD_S, decoded

INSTANT_FLAGS = ("--ttft-ms", "0", "--itl-ms", "0")


@asynccontextmanager
async def spawned(*flags: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hpc_router.sim", *flags, stdout=PIPE, stderr=PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def address(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(GUARD_S):
        listening = decoded(await process.stdout.readline())["listening"]
    assert isinstance(listening, str)
    return listening


async def ended(process: Process) -> tuple[int | None, str]:
    async with asyncio.timeout(GUARD_S):
        _, errors = await process.communicate()
    return process.returncode, errors.decode()


Start = Callable[[SimConfig], Awaitable[tuple[SimServer, aiohttp.ClientSession]]]
