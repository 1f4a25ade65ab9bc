"""Every asynchronous test here runs on asyncio's own event loop and on uvloop, which serves, and over either relay."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from tests.support.relays import RELAYS, Listen, MakeClient, Relay


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=list(RELAYS.values()), ids=list(RELAYS))
def relay(request: pytest.FixtureRequest) -> Relay:
    """The one that serves, and its reference."""
    made: Relay = request.param
    return made


@pytest.fixture
def make_client(relay: Relay) -> MakeClient:
    return relay.make_client


@pytest.fixture
def listen(relay: Relay) -> Listen:
    return relay.listen
