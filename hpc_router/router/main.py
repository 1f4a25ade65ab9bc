"""The router's main program: binds the address, runs the supervisor, and withdraws the router's record at the end.

The record with the address is published only once the workers listen. A router that starts again on the same node takes
the port of the previous router, unless another process has it, so that clients find it again by the address alone.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import uvloop

from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, RegistryError
from hpc_router.net import addresses
from hpc_router.net.auth import new_token, replica_key
from hpc_router.net.tls import read_certificate, server_context
from hpc_router.relay.downstream.server import raise_file_limit
from hpc_router.router.children import RouterSettings, run_control, run_worker
from hpc_router.router.ipc.shared_counters import Counters
from hpc_router.router.ipc.supervisor import RouterSupervisor
from hpc_router.router.policies import load_policy
from hpc_router.router.settings import with_desired
from hpc_router.router.worker.process import Identity
from hpc_router.state.io_thread import WRITE_TIMEOUT_S, FileThread, file_thread
from hpc_router.state.job_records import Exit, FailureReason, JobDir
from hpc_router.state.registry import Record, RecordKind, State, http_url, split_replica, withdraw
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

_EVERYWHERE: Final = frozenset({"", "0.0.0.0", "::"})
_MARGIN_S: Final = 3.0


def main(run: RunDir, deployment: Deployment, *, replica: str) -> int:
    """Serves until a stop signal, writes the job's exit record and returns the exit status of the process. If the
    router fails, raises the error."""
    job = JobDir(run, replica)
    job.claim()
    raise_file_limit()
    try:
        cut = supervise(run, deployment, job)
    except BaseException as error:
        invalid = isinstance(error, ConfigError)
        message = str(error) if invalid else f"{type(error).__name__}: {error}"
        with _final_files(job) as files:
            logger.error("the router failed: %s", message, exc_info=None if invalid else error)
            files.post(
                partial(job.write, Exit(False, FailureReason.BAD_OPTION if invalid else FailureReason.CRASHED, message))
            )
        raise
    with _final_files(job) as files:
        files.post(partial(job.write, Exit.drained("stopped", cut=cut)))
    return 0


@contextlib.contextmanager
def _final_files(job: JobDir) -> Iterator[FileThread]:
    """Yields a file thread for the files that are written last. Withdraws the router's record through it, in case the
    control process died before it could. A thread is allowed here because no process is forked any more."""
    with file_thread(f"files of {job.replica}", log=job.agent_log) as files:
        files.post(partial(withdraw, job.run.registry, job.replica))
        yield files


def supervise(run: RunDir, deployment: Deployment, job: JobDir) -> int:
    """Serves until a stop signal; returns the number of requests that were cut off. Raises ConfigError for an invalid
    config, and LaunchError if the router's processes repeatedly end."""
    base, deployment = deployment, _with_desired(run, deployment)
    config = deployment.router
    policy = load_policy(run, deployment)
    workers = config.workers or usable_cpus(os.environ, asked=config.resources.cpus)
    nonce = new_token()
    with bind(run, deployment, node=socket.gethostname()) as reserved:
        # Set after the bind: before it, the bind would succeed on a port that another router already uses.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        identity = Identity(
            replica=job.replica,
            key=replica_key(run.secret(), nonce),
            nonce=nonce,
            token=None if config.open else run.token(),
            started_at=time.time(),
        )
        record = _record(deployment, job.replica, reserved, nonce=nonce)
        router = RouterSettings(run, base, deployment, job, record, identity, policy, Counters(workers=workers))
        supervisor = RouterSupervisor(
            control=lambda spec: uvloop.run(run_control(router, spec)),
            worker=lambda spec: uvloop.run(run_worker(router, spec)),
            listen=partial(beside, reserved),
            counters=router.counters,
            stop_s=config.drain_s + 2 * WRITE_TIMEOUT_S + _MARGIN_S,
        )
        supervisor.run()
        return supervisor.cut


def _with_desired(run: RunDir, deployment: Deployment) -> Deployment:
    """Returns the deployment with the changes of `desired.json`; without them if the file is not valid, which the
    control process will report."""
    try:
        return with_desired(deployment, run.read_desired())
    except (ConfigError, RegistryError):
        return deployment


def usable_cpus(environment: Mapping[str, str], *, asked: int) -> int:
    """Returns the number of CPUs that this job may use. Outside Slurm this is at most `asked`, because the machine is
    shared."""
    usable = len(os.sched_getaffinity(0))
    if "SLURM_JOB_ID" not in environment:
        return max(1, min(usable, asked))
    allocated = environment.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(usable, int(allocated) if allocated.isdecimal() else asked))


def beside(reserved: socket.socket) -> socket.socket:
    """Returns another socket bound to the address of `reserved`. The kernel spreads new connections over all sockets
    that listen there."""
    sock = socket.socket(reserved.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(reserved.getsockname())
    except BaseException:
        sock.close()
        raise
    return sock


def bind(run: RunDir, deployment: Deployment, *, node: str) -> socket.socket:
    """Returns a socket bound to the configured port, else to the port of the last router on this node if it is free,
    else to any free port. Raises ConfigError if the configured port or address cannot be used."""
    config = deployment.router
    ports = [config.port] if config.port else [port for port in (_previous_port(run, node), 0) if port is not None]
    host = _fabric(deployment) if config.host is None else config.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except (OSError, UnicodeError) as error:
            sock.close()
            if port == ports[-1]:
                why = getattr(error, "strerror", None) or error
                raise ConfigError(f"router.host={host} router.port={port}: {why}") from error
        else:
            return sock
    raise AssertionError("unreachable: the last port either binds or raises")


def _record(deployment: Deployment, replica: str, sock: socket.socket, *, nonce: str) -> Record:
    """Returns the router's record as first published. Raises ConfigError if its certificate cannot be used."""
    host, port = sock.getsockname()[:2]
    config, certificate = deployment.router, None
    if config.tls_cert is not None and config.tls_key is not None:
        certificate = read_certificate(Path(config.tls_cert))
        server_context(Path(config.tls_cert), Path(config.tls_key))  # raises if the pair is not usable
    address = _fabric(deployment) if host in _EVERYWHERE else host
    return Record(
        kind=RecordKind.ROUTER,
        replica=replica,
        url=http_url(address, port, tls=certificate is not None),
        certificate=certificate,
        state=State.STARTING,
        serves={},
        generation=split_replica(replica)[2],
        nonce=nonce,
        node=socket.gethostname(),
        beat_s=deployment.cluster.beat_s,
    )


def _fabric(deployment: Deployment) -> str:
    return addresses.address(deployment.cluster.fabric, kind=deployment.cluster.kind)


def _previous_port(run: RunDir, node: str) -> int | None:
    """Returns the port of the last router that served on this node; None if there is none."""
    routers = [folder.name for folder in run.jobs.glob(f"{RecordKind.ROUTER}-0.g*")]
    for replica in sorted(routers, key=lambda name: split_replica(name)[2], reverse=True):
        progress = JobDir(run, replica).progress()
        if progress is not None and progress.node == node and progress.url is not None:
            return urlsplit(progress.url).port
    return None
