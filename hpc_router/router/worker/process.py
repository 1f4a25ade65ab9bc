"""A worker process of the router, which serves clients on its own socket.

The worker starts to serve once the control process has sent it the replicas. While it drains, it rejects new requests.
It closes its socket after the router's record is withdrawn, because clients find no way to this router then.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_router.background_tasks import background
from hpc_router.config.elastic import on_demand
from hpc_router.config.schema import Deployment, RouterConfig
from hpc_router.errors import HpcRouterError
from hpc_router.net.tls import load_pair, server_context
from hpc_router.relay.downstream.server import listening
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.relay.upstream.interface import Upstream, UpstreamTimeouts
from hpc_router.router.access.user_access import UserTokens
from hpc_router.router.ipc.messages import Settings
from hpc_router.router.ipc.shared_counters import CUT_OFF, IN_FLIGHT, Counters
from hpc_router.router.metrics import Metrics
from hpc_router.router.policies import load_policy
from hpc_router.router.replicas.admission import queue_limits
from hpc_router.router.replicas.sessions import Sessions
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker.batch_api import BatchApi, streams_body
from hpc_router.router.worker.control_client import ControlClient
from hpc_router.router.worker.dispatcher import Dispatcher, stream_timeouts_of
from hpc_router.router.worker.gateway import Gateway
from hpc_router.router.worker.request_records import RequestRecords
from hpc_router.router.worker.route_request import RequestRouting
from hpc_router.routing.policy import Policy, versions
from hpc_router.state.io_thread import FileThread
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The identity of a router, the same in all of its workers. `token`: the owner's token; None turns authentication
    off. `key`: signs the challenges of `/health`. `nonce`: that of the router's record, for challenges of other
    users."""

    replica: str
    key: str
    nonce: str
    token: str | None
    started_at: float


@asynccontextmanager
async def control_client(deployment: Deployment, counters: Counters, worker: int) -> AsyncIterator[ControlClient]:
    """Yields a worker's client for the control process, with an empty replica table; `attach` connects it later."""
    config = deployment.router
    table = ReplicaTable(
        config.pin_bound, queue_limits(deployment), cells=counters.row(worker), peers=counters.others(worker),
        order=counters.order(worker), on_demand=on_demand(deployment.experts),
    )  # fmt: skip
    users = UserTokens(counters.token_row(worker), counters.token_others(worker))
    link = ControlClient(table, Sessions(), Metrics(), ejects_at_once=config.eject_connect_errors == 1, users=users)
    try:
        yield link
    finally:
        link.close()


@asynccontextmanager
async def serving(
    run: RunDir,
    deployment: Deployment,
    policy: Policy,
    link: ControlClient,
    *,
    identity: Identity,
    sock: socket.socket,
    files: FileThread,
    worker: int = 0,
    make_client: Callable[[UpstreamTimeouts], AbstractAsyncContextManager[Upstream]] = UpstreamClient,
    listen: Callable[..., AbstractAsyncContextManager[asyncio.Server]] = listening,
) -> AsyncIterator[Gateway]:
    """Serves requests on `sock` within the block. At its end, running requests get `router.drain_s` seconds to finish.
    `link`: the connection to the control process, whose first snapshot is awaited. `files`: thread that writes the
    records of requests. `worker`: number of this worker."""
    config = deployment.router
    await link.informed.wait()
    async with make_client(stream_timeouts_of(config)) as client:
        in_flight = InFlight(link.table.cells, link.table.peers, IN_FLIGHT)
        writer = f"{identity.replica}.worker{worker}"
        records = RequestRecords(run, files, writer, link.metrics, config, window=deployment.policy.window)
        dispatcher = Dispatcher(
            table=link.table, health=link, client=client, metrics=link.metrics, config=config, in_flight=in_flight,
            records=records,
        )  # fmt: skip
        routing = RequestRouting(deployment, link.table, policy, dispatcher, link.metrics, link.sessions)
        gateway = Gateway(
            deployment, link.table, routing, dispatcher, link.metrics, link,
            token=identity.token, replica=identity.replica, key=identity.key, nonce=identity.nonce,
            started_at=identity.started_at,
            users=link.users, in_flight=in_flight,
        )  # fmt: skip
        gateway.batch_api = batch_api = BatchApi(
            run, lambda: gateway.deployment.router.batch, lambda: gateway.deployment.router.idle_timeout_s
        )
        max_body = int(config.max_body_mb * 2**20)
        tls = await asyncio.to_thread(_tls, config)
        serve = listen(
            gateway.handle, sock, max_body=max_body, cross_origin=gateway.cross_origin, tls=tls,
            streams_body=streams_body,
        )  # fmt: skip
        with closing(records), closing(batch_api):
            async with serve as listener:
                link.start_serving()
                try:
                    async with following_settings(gateway, link, run), _following_certificate(tls, config, link):
                        yield gateway
                finally:
                    listener.close()
                    try:
                        async with asyncio.timeout(config.drain_s):
                            await gateway.in_flight.idle()
                    except TimeoutError:
                        link.table.cells[CUT_OFF] = gateway.in_flight.count
                        logger.warning(
                            "%d requests did not end within router.drain_s: cut off", gateway.in_flight.count
                        )


@asynccontextmanager
async def following_settings(gateway: Gateway, link: ControlClient, run: RunDir) -> AsyncIterator[None]:
    """Within the block, applies all settings that the control process sends, in their order. Requests that are already
    running keep their old settings."""
    changed = asyncio.Event()

    async def follow() -> None:
        while True:
            await changed.wait()
            changed.clear()
            try:
                if link.settings is not None:
                    await _apply_settings(gateway, link.settings, run)
            except (HpcRouterError, OSError) as error:
                logger.warning("settings were not applied: %s", error)

    link.on_settings = changed.set
    if link.settings is not None:
        changed.set()
    async with background("settings", follow, link.task_failed):
        yield


def _tls(config: RouterConfig) -> ssl.SSLContext | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return server_context(Path(config.tls_cert), Path(config.tls_key))


@asynccontextmanager
async def _following_certificate(
    tls: ssl.SSLContext | None, config: RouterConfig, link: ControlClient
) -> AsyncIterator[None]:
    """Within the block, loads the router's certificate again when its files have changed; later connections use it."""
    if tls is None or config.tls_cert is None or config.tls_key is None:
        yield
        return
    cert, key, changed = Path(config.tls_cert), Path(config.tls_key), asyncio.Event()

    async def follow() -> None:
        while True:
            await changed.wait()
            changed.clear()
            try:
                await asyncio.to_thread(server_context, cert, key)  # the files may have changed again
                await asyncio.to_thread(load_pair, tls, cert, key)
                logger.info("the certificate of %s is used from now on", cert)
            except HpcRouterError as error:
                logger.warning("the certificate was not changed: %s", error)

    link.on_certificate = changed.set
    async with background("certificate", follow, link.task_failed):
        yield


async def _apply_settings(gateway: Gateway, settings: Settings, run: RunDir) -> None:
    gateway.table.set_scaled_to_zero(settings.scaled_to_zero)
    deployment = replace(
        gateway.deployment,
        policy=settings.policy,
        router=settings.router,
    )
    policy = gateway.policy
    same_artefacts = (settings.artefact, settings.shadow) == versions(policy)
    if deployment == gateway.deployment and same_artefacts:
        return
    if deployment.policy != gateway.deployment.policy or not same_artefacts:
        policy = await asyncio.to_thread(load_policy, run, deployment)
    gateway.reconfigure(deployment, policy)
    logger.info("settings applied, artefact %s", policy.version)
