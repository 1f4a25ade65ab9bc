"""Every asynchronous test here runs on asyncio's own event loop and on uvloop, which serves, and over either client."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from hpc_router.relay.upstream import UpstreamClient
from hpc_router.relay.upstream_aiohttp import AiohttpClient
from tests.relay.scripted import MakeClient


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=[UpstreamClient, AiohttpClient])
def make_client(request: pytest.FixtureRequest) -> MakeClient:
    """The client that serves, and its reference."""
    made: MakeClient = request.param
    return made
