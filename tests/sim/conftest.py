from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest

from hpc_router.sim.config import SimConfig
from hpc_router.sim.server import SimServer
from tests.sim.calls import INSTANT, client
from tests.sim.support import Start


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts engines on port 0, each with a client session. All are stopped when the test ends."""
    async with AsyncExitStack() as stack:

        async def begin(config: SimConfig = INSTANT) -> tuple[SimServer, aiohttp.ClientSession]:
            engine = await stack.enter_async_context(SimServer(config))
            return engine, await stack.enter_async_context(client(engine))

        yield begin
