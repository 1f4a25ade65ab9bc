"""The router's children from their birth to their end: one control process, N workers.

The record in the registry is the control process's: it is ready once the workers serve, and withdrawn before they
close their sockets. A control process that takes the place of another finds the record there and goes on renewing it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from hpc_router.config.schema import Deployment
from hpc_router.relay import memory_tuning
from hpc_router.router.control.process import ControlProcess
from hpc_router.router.control.reconcile_process import ReconcileProcess
from hpc_router.router.ipc.shared_counters import IN_FLIGHT, Counters
from hpc_router.router.ipc.supervisor import CONTROL, ChildSpec, worker_name
from hpc_router.router.ipc.supervisor_commands import CommandReader
from hpc_router.router.worker.process import Identity, control_client, serving
from hpc_router.routing.policy import Policy, versions
from hpc_router.state.io_thread import PATIENCE_S, FileThread, file_thread
from hpc_router.state.job_records import JobDir, JobPhase, JobProgress
from hpc_router.state.lease import Lease
from hpc_router.state.registry import Record, State
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

BEGIN_S: Final = 10.0
"""Workers that do not serve by then are not waited for."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What is settled before the first process is forked. `deployment`: `base` with the settings of `desired.json`."""

    run: RunDir
    base: Deployment
    deployment: Deployment
    job: JobDir
    record: Record
    identity: Identity
    policy: Policy
    counters: Counters


async def control(router: RouterSettings, birth: ChildSpec) -> None:
    """The control process."""
    run, job = router.run, router.job
    supervisor = os.getppid()
    artefact, shadow = versions(router.policy)
    with file_thread(f"files of {job.replica}", log=job.agent_log, label=CONTROL) as files:
        parts = ControlProcess(
            run, router.base, router.deployment, router.counters, files, job.replica,
            started_at=router.identity.started_at, artefact=artefact, shadow=shadow, processes=birth.processes,
        )  # fmt: skip
        for news in birth.news:
            logger.warning("%s", news)
        lease = Lease(
            run.registry,
            router.record,
            files,
            on_gone=lambda: os.kill(supervisor, signal.SIGTERM),
            on_failure=parts.task_failed,
        )
        parts.lease = lease
        orders = CommandReader(
            birth.orders, partial(_attach, parts), on_note=partial(_note, parts), on_reload=parts.changes.look_now
        )
        async with orders, parts.watching(birth.ways):
            async with lease, _control_loop(router, parts, files):
                await parts.served(limit_s=BEGIN_S)
                await lease.update(state=State.READY)
                url, node = lease.record.url, lease.record.node
                ready = JobProgress(JobPhase.READY, pid=supervisor, ready_at=time.time(), url=url, node=node)
                files.post(partial(job.write, ready))
                logger.info("serving at %s with %d workers", url, router.counters.workers)
                memory_tuning.tune()
                await orders.drain.wait()
                parts.draining = True
                logger.info("draining: %d requests in flight", router.counters.total(IN_FLIGHT))
                await lease.update(state=State.DRAINING)
                files.post(partial(job.write, replace(ready, phase=JobPhase.DRAINING, at=time.time())))
            parts.leave()
            await orders.end.wait()
        logger.info("stopped")


async def work(router: RouterSettings, birth: ChildSpec) -> None:
    """A worker."""
    assert birth.worker is not None
    assert birth.listener is not None
    run, name = router.run, worker_name(birth.worker)
    with file_thread(f"log of {name}", log=router.job.worker_log(birth.worker), label=name):
        async with control_client(router.deployment, router.counters, birth.worker) as link:
            orders = CommandReader(birth.orders, lambda _, way: link.attach(way))
            async with orders:
                for way in birth.ways.values():
                    await link.attach(way)
                async with serving(
                    run, router.deployment, router.policy, link, identity=router.identity, sock=birth.listener
                ) as gateway:
                    memory_tuning.tune_for_relay()
                    await orders.drain.wait()
                    gateway.draining = True
                    with contextlib.suppress(TimeoutError):  # there may be no control process any more
                        async with asyncio.timeout(2 * PATIENCE_S):
                            await link.released.wait()


async def _attach(parts: ControlProcess, worker: int | None, way: socket.socket) -> None:
    assert worker is not None
    await parts.attach(worker, way)


def _note(parts: ControlProcess, note: Mapping[str, Any]) -> None:
    parts.processes = note["processes"]
    if note["news"] is not None:
        logger.warning("%s", note["news"])


def _control_loop(
    router: RouterSettings, parts: ControlProcess, files: FileThread
) -> contextlib.AbstractAsyncContextManager[object]:
    """The loop that keeps up what `config.yaml` wants, as soon as there is one."""
    if router.deployment.router.reconcile:
        return ReconcileProcess(router.run, files, replica=router.job.replica, on_failure=parts.task_failed)
    return contextlib.nullcontext()
