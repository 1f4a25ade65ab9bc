"""A router's life: bind, discover, publish, serve, drain, leave.

The address is published only once the server listens. A router that comes back on the same host takes the port its
predecessor had, when that is free, so that clients which know only the address find it again.
"""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvloop

from hpc_router import fabric
from hpc_router.auth import new_token, replica_key
from hpc_router.config import Deployment
from hpc_router.errors import ConfigError
from hpc_router.files import replace_json
from hpc_router.filethread import FileThread, file_thread
from hpc_router.jobdir import Exit, JobDir, Phase, Progress, Reason
from hpc_router.lease import Lease
from hpc_router.registry import Kind, Reader, Record, State, http_url, leading_router, split_replica
from hpc_router.relay import collector
from hpc_router.relay.exchange import Limits, Upstream
from hpc_router.relay.server import listening
from hpc_router.relay.upstream import UpstreamClient
from hpc_router.router.app import Gateway
from hpc_router.router.control import ControlLoop
from hpc_router.router.discovery import Discovery, registry_file
from hpc_router.router.dispatch import Dispatcher
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas import ReplicaTable
from hpc_router.routing.artefact import read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.policy import Policy, build_policy
from hpc_router.rundir import RunDir

logger = logging.getLogger(__name__)

_EVERYWHERE: Final = frozenset({"", "0.0.0.0", "::"})
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def main(run: RunDir, deployment: Deployment, *, replica: str) -> int:
    """Serve until told to stop; the exit status of the process."""
    job = JobDir(run, replica)
    job.claim()
    raise_file_limit()
    with file_thread(f"files of {replica}", log=job.agent_log) as files:
        try:
            uvloop.run(_live(run, deployment, job, files))
        except ConfigError as error:
            logger.error("%s", error)
            job.write(Exit(ok=False, reason=Reason.BAD_OPTION, message=str(error)))
            raise
        except BaseException as error:
            logger.exception("the router failed")
            job.write(Exit(ok=False, reason=Reason.CRASHED, message=f"{type(error).__name__}: {error}"))
            raise
        files.post(partial(job.write, Exit(ok=True, reason=Reason.DRAINED, message="stopped")))
    return 0


def raise_file_limit() -> None:
    """Each stream takes two descriptors, and 1,024 is a common soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _live(run: RunDir, deployment: Deployment, job: JobDir, files: FileThread) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    sock, nonce = bind(run, deployment, node=socket.gethostname()), new_token()
    record = _record(deployment, job.replica, sock, nonce=nonce)
    async with (
        serving(run, deployment, replica=job.replica, nonce=nonce, sock=sock, files=files) as gateway,
        Lease(run.registry, record, files, on_gone=stop.set) as lease,
        _control(run, deployment, job),
    ):
        await lease.update(state=State.READY)
        files.post(partial(job.write, Progress(Phase.READY, ready_at=time.time())))
        logger.info("serving at %s", lease.record.url)
        collector.settle()
        await stop.wait()
        gateway.draining = True
        logger.info("draining: %d requests in flight", gateway.in_flight.count)
        await lease.update(state=State.DRAINING)
        files.post(partial(job.write, Progress(Phase.DRAINING)))
    logger.info("stopped")


@asynccontextmanager
async def serving(
    run: RunDir,
    deployment: Deployment,
    *,
    replica: str,
    nonce: str,
    sock: socket.socket,
    files: FileThread,
    make_client: Callable[[Limits], AbstractAsyncContextManager[Upstream]] = UpstreamClient,
    listen: Callable[..., AbstractAsyncContextManager[asyncio.Server]] = listening,
) -> AsyncIterator[Gateway]:
    """The router's parts, wired and listening on `sock`; at the end in-flight requests get `router.drain_s`.

    It proves to be the router whose record has this `nonce`.
    """
    config = deployment.router
    policy = load_policy(run, deployment)
    table = ReplicaTable(pin_bound=config.pin_bound)
    clock = asyncio.get_running_loop().time
    keeper = RegistryFile(run, replica, files)
    discovery = Discovery(run, config, table, on_snapshot=keeper.keep, clock=clock, files=files)
    limits = Limits(config.connect_timeout_s, config.first_byte_timeout_s, config.idle_timeout_s)
    async with make_client(limits) as client, discovery:
        metrics = Metrics(
            table,
            in_flight=lambda: gateway.in_flight.count + gateway.in_flight.others,
            registry_age_s=discovery.registry_age_s,
        )
        dispatcher = Dispatcher(table=table, witness=discovery, client=client, metrics=metrics, config=config)
        token = None if config.open else run.token()
        key = replica_key(run.secret(), nonce)
        gateway = Gateway(
            deployment, table, policy, dispatcher, discovery, metrics, token=token, replica=replica, key=key
        )
        async with listen(
            gateway.handle, sock, max_body=int(config.max_body_mb * 2**20), express=gateway.express
        ) as listener:
            try:
                yield gateway
            finally:
                keeper.leave()
                listener.close()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(config.drain_s):
                        await gateway.in_flight.idle()


class RegistryFile:
    """Keeps `registry.json` while this router leads: the whole registry in one file, for people and scripts."""

    def __init__(self, run: RunDir, replica: str, files: FileThread) -> None:
        self._run, self._replica, self._files = run, replica, files
        self._content: Mapping[str, Any] | None = None
        self._left = False

    def keep(self, snapshot: Mapping[str, Record]) -> None:
        """Write it in the background when something changed."""
        leader = leading_router(snapshot)
        if leader is None or leader.replica != self._replica or self._left:
            return
        content = registry_file(snapshot)
        if content != self._content:
            self._content = content
            self._files.post(partial(replace_json, self._run.registry_json, content))

    def leave(self) -> None:
        """Once more, after the record was withdrawn: the file of one that led does not go on naming it."""
        self._left = True
        if self._content is not None:
            self._files.post(self._write_last)

    def _write_last(self) -> None:
        others = {name: r for name, r in Reader(self._run.registry).snapshot().items() if name != self._replica}
        leader = leading_router(others)
        if leader is None or leader.generation < split_replica(self._replica)[2]:  # else it is the successor's file
            replace_json(self._run.registry_json, registry_file(others))


def load_policy(run: RunDir, deployment: Deployment) -> Policy:
    """The configured policy with its classifier. Raises ConfigError or ArtefactError."""
    config = deployment.policy
    if config.kind != "classifier":
        return build_policy(kind=config.kind, fallback=config.fallback)
    folder = run.classifier if config.artefact is None else Path(config.artefact)
    if not folder.is_dir():
        raise ConfigError(
            f"policy=classifier finds no artefact at {folder}: give policy.artefact=DIR, or experts with exemplars "
            "and start with `hpc-router up`"
        )
    artefact = read(folder)
    if config.margin is not None:
        artefact = replace(artefact, margin_threshold=config.margin)
    classifier = Classifier(artefact, experts=deployment.experts or None)
    return build_policy(kind=config.kind, classifier=classifier, fallback=config.fallback)


def bind(run: RunDir, deployment: Deployment, *, node: str) -> socket.socket:
    """A bound socket: the configured port, else the predecessor's, else a free one."""
    config = deployment.router
    ports = [config.port] if config.port else [port for port in (_previous_port(run, node), 0) if port is not None]
    host = _fabric(deployment) if config.host is None else config.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            sock.close()
            if port == ports[-1]:
                raise ConfigError(f"router.host={host} router.port={port}: {error.strerror}") from error
        else:
            return sock
    raise AssertionError("unreachable: the last port either binds or raises")


def _record(deployment: Deployment, replica: str, sock: socket.socket, *, nonce: str) -> Record:
    host, port = sock.getsockname()[:2]
    address = _fabric(deployment) if host in _EVERYWHERE else host
    return Record(
        kind=Kind.ROUTER,
        replica=replica,
        url=http_url(address, port),
        state=State.STARTING,
        serves={},
        generation=split_replica(replica)[2],
        nonce=nonce,
        node=socket.gethostname(),
        beat_s=deployment.cluster.beat_s,
    )


def _fabric(deployment: Deployment) -> str:
    return fabric.address(deployment.cluster.fabric, kind=deployment.cluster.kind)


def _control(run: RunDir, deployment: Deployment, job: JobDir) -> contextlib.AbstractAsyncContextManager[object]:
    """The control loop, which keeps up what `config.yaml` wants, as soon as there is one."""
    if deployment.router.reconcile:
        return ControlLoop(run, replica=job.replica)
    return contextlib.nullcontext()


def _previous_port(run: RunDir, node: str) -> int | None:
    """The port of the latest router that this host had."""
    routers = [r for r in Reader(run.registry).snapshot().values() if r.kind is Kind.ROUTER and r.node == node]
    latest = max(routers, key=lambda r: r.generation, default=None)
    port = latest.url.rpartition(":")[2] if latest else ""
    return int(port) if port.isdecimal() else None
