"""A data-plane process of the router: it serves clients on a socket of its own, by what the control process tells it.

It begins to serve once it knows the replicas. Asked to drain, it takes nothing new, and closes its socket as soon as
nobody is sent here any more.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from hpc_router.config import Deployment, RouterConfig
from hpc_router.relay.exchange import Limits, Upstream
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.server import listening
from hpc_router.relay.upstream import UpstreamClient
from hpc_router.router.app import Gateway
from hpc_router.router.counters import IN_FLIGHT, Counters
from hpc_router.router.dispatch import Dispatcher
from hpc_router.router.link import ControlLink
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas import ReplicaTable
from hpc_router.router.sessions import Sessions
from hpc_router.routing.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What all workers of a router answer as. `token` None: open to everybody; `key` proves who answers."""

    replica: str
    key: str
    token: str | None
    started_at: float


@asynccontextmanager
async def linked(config: RouterConfig, counters: Counters, worker: int) -> AsyncIterator[ControlLink]:
    """What a worker knows of the replicas, once it is attached to a control process."""
    table = ReplicaTable(config.pin_bound, cells=counters.row(worker), peers=counters.others(worker))
    link = ControlLink(table, Sessions(), Metrics(), ejects_at_once=config.eject_connect_errors == 1)
    try:
        yield link
    finally:
        link.close()


@asynccontextmanager
async def working(
    deployment: Deployment,
    policy: Policy,
    link: ControlLink,
    *,
    identity: Identity,
    sock: socket.socket,
    make_client: Callable[[Limits], AbstractAsyncContextManager[Upstream]] = UpstreamClient,
    listen: Callable[..., AbstractAsyncContextManager[asyncio.Server]] = listening,
) -> AsyncIterator[Gateway]:
    """Serves on `sock` within the block; at its end in-flight requests get `router.drain_s`."""
    config = deployment.router
    await link.informed.wait()
    async with make_client(
        Limits(config.connect_timeout_s, config.first_byte_timeout_s, config.idle_timeout_s)
    ) as client:
        dispatcher = Dispatcher(table=link.table, witness=link, client=client, metrics=link.metrics, config=config)
        gateway = Gateway(
            deployment, link.table, policy, dispatcher, link.metrics, link,
            token=identity.token, replica=identity.replica, key=identity.key, started_at=identity.started_at,
            in_flight=InFlight(link.table.cells, link.table.peers, IN_FLIGHT),
        )  # fmt: skip
        max_body = int(config.max_body_mb * 2**20)
        async with listen(gateway.handle, sock, max_body=max_body, express=gateway.express) as listener:
            link.begin_to_serve()
            try:
                yield gateway
            finally:
                listener.close()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(config.drain_s):
                        await gateway.in_flight.idle()
