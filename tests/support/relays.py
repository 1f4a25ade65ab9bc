"""The two implementations of the data path with which its tests run: the product's, and a reference on aiohttp."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from hpc_router.relay.downstream import server
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.relay.upstream.interface import Upstream
from tests.relay.reference import server as server_aiohttp
from tests.relay.reference.upstream import AiohttpClient

MakeClient = Callable[..., AbstractAsyncContextManager[Upstream]]
Listen = Callable[..., AbstractAsyncContextManager[asyncio.Server]]


@dataclass(frozen=True)
class Relay:
    make_client: MakeClient
    listen: Listen
    warm: bool = False
    """Whether connections to replicas are opened before the first request."""


OWN = Relay(UpstreamClient, server.listening)
WARM = Relay(UpstreamClient, server.listening, warm=True)
RELAYS = {"relay": OWN, "aiohttp": Relay(AiohttpClient, server_aiohttp.listening)}
