"""The programs of the router's child processes: one control process, N workers.

The control process owns the router's record in the registry: it sets the record to ready once the workers serve, and
withdraws it before they close their sockets. A control process that replaces another finds the record there and
continues to renew it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from hpc_router.config.schema import Deployment
from hpc_router.relay import memory_tuning
from hpc_router.router.control.process import ControlProcess
from hpc_router.router.control.reconcile_process import ReconcileProcess
from hpc_router.router.ipc.messages import ProcessesChanged
from hpc_router.router.ipc.shared_counters import IN_FLIGHT, Counters
from hpc_router.router.ipc.supervisor import CONTROL, ChildSpec, worker_name
from hpc_router.router.ipc.supervisor_commands import CommandReader
from hpc_router.router.worker.process import Identity, control_client, serving
from hpc_router.routing.policy import Policy, versions
from hpc_router.state.io_thread import WRITE_TIMEOUT_S, FileThread, file_thread
from hpc_router.state.job_expiry import JobExpiry
from hpc_router.state.job_records import JobDir, JobPhase, JobProgress
from hpc_router.state.lease import Lease
from hpc_router.state.registry import Record, State
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

SERVING_TIMEOUT_S: Final = 10.0
"""Maximum time in seconds that the router waits for all workers to serve before it publishes itself as ready."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """The values that are fixed before the first child process is forked. `base`: the configured deployment;
    `deployment`: the same with the changes of `desired.json`."""

    run: RunDir
    base: Deployment
    deployment: Deployment
    job: JobDir
    record: Record
    identity: Identity
    policy: Policy
    counters: Counters


async def run_control(router: RouterSettings, spec: ChildSpec) -> None:
    """Runs the control process until the supervisor ends it."""
    run, job = router.run, router.job
    supervisor = os.getppid()
    artefact, shadow = versions(router.policy)
    with file_thread(f"files of {job.replica}", log=job.agent_log, label=CONTROL) as files:
        control = ControlProcess(
            run, router.base, router.deployment, router.counters, files, job.replica,
            started_at=router.identity.started_at, artefact=artefact, shadow=shadow, processes=spec.processes,
        )  # fmt: skip
        for notice in spec.notices:
            logger.warning("%s", notice)
        lease = Lease(
            run.registry,
            router.record,
            files,
            expires_at=JobExpiry(run, os.environ).read,
            on_gone=lambda: os.kill(supervisor, signal.SIGTERM),
            on_failure=control.task_failed,
        )
        control.lease = lease
        commands = CommandReader(
            spec.commands,
            partial(_attach, control),
            on_processes=partial(_processes_changed, control),
            on_reload=control.config_watcher.check_now,
        )
        async with commands, control.watching(spec.channels):
            async with lease, _reconcile_process(router, control, files):
                await control.workers.served(timeout_s=SERVING_TIMEOUT_S)
                await control.take_over()
                await lease.update(state=State.READY)
                url, node = lease.record.url, lease.record.node
                ready = JobProgress(JobPhase.READY, pid=supervisor, ready_at=time.time(), url=url, node=node)
                files.post(partial(job.write, ready))
                logger.info("serving at %s with %d workers", url, router.counters.workers)
                memory_tuning.tune()
                await commands.drain.wait()
                control.draining = True
                logger.info("draining: %d requests in flight", router.counters.total(IN_FLIGHT))
                await lease.update(state=State.DRAINING)
                files.post(partial(job.write, replace(ready, phase=JobPhase.DRAINING, at=time.time())))
            control.leave()
            await commands.end.wait()
        logger.info("stopped")


async def run_worker(router: RouterSettings, spec: ChildSpec) -> None:
    """Runs a worker until the supervisor makes it drain and it has drained."""
    assert spec.worker is not None
    assert spec.listener is not None
    run, name = router.run, worker_name(spec.worker)
    with file_thread(f"log of {name}", log=router.job.worker_log(spec.worker), label=name) as files:
        async with control_client(router.deployment, router.counters, spec.worker) as link:
            commands = CommandReader(spec.commands, lambda _, channel: link.attach(channel))
            async with commands:
                for channel in spec.channels.values():
                    await link.attach(channel)
                async with serving(
                    run,
                    router.deployment,
                    router.policy,
                    link,
                    identity=router.identity,
                    sock=spec.listener,
                    files=files,
                    worker=spec.worker,
                ) as gateway:
                    memory_tuning.tune_for_relay()
                    await commands.drain.wait()
                    gateway.draining = True
                    with contextlib.suppress(TimeoutError):  # the control process may have ended
                        async with asyncio.timeout(2 * WRITE_TIMEOUT_S):
                            await link.released.wait()


async def _attach(control: ControlProcess, worker: int | None, channel: socket.socket) -> None:
    assert worker is not None
    await control.workers.attach(worker, channel)


def _processes_changed(control: ControlProcess, message: ProcessesChanged) -> None:
    control.processes = message.processes
    if message.notice is not None:
        logger.warning("%s", message.notice)


def _reconcile_process(
    router: RouterSettings, control: ControlProcess, files: FileThread
) -> contextlib.AbstractAsyncContextManager[object]:
    """Returns a context manager that runs the control loop beside the router; if `router.reconcile` is off, one that
    does nothing."""
    if router.deployment.router.reconcile:
        return ReconcileProcess(router.run, files, replica=router.job.replica, on_failure=control.task_failed)
    return contextlib.nullcontext()
