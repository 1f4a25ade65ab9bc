"""The main program of a replica's job, from its port to its exit record. Start reading at `Agent._serve_job`.

The agent listens, publishes its record, starts the engine, and serves until it is drained, the replica is removed, or
the engine fails permanently; then it releases everything in reverse order. One thread writes the files, so that a
hanging shared file system blocks no request.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Final

from hpc_router.background_tasks import TaskFailures, restarting
from hpc_router.config.adapters import adapters_of
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, HpcRouterError, RegistryError
from hpc_router.expert.agent.engine_relay import ENGINE_LIMITS
from hpc_router.expert.agent.engine_supervisor import EngineSupervisor, LoadedEngine
from hpc_router.expert.agent.http_api import AgentHttpApi
from hpc_router.expert.agent.lifecycle import JobLifecycle
from hpc_router.expert.agent.restart_policy import RestartPolicy
from hpc_router.expert.engine_process.command import EngineCommands
from hpc_router.expert.engine_process.process import Command
from hpc_router.expert.engine_process.scratch_dir import expanded, scratch_folder
from hpc_router.expert.engines import Engine, EngineFailure, Place, Ranks, build_engine
from hpc_router.expert.multinode.rank_auth import rank_key, report_token
from hpc_router.expert.multinode.start_strategy import MultiNodeLeader, SingleNode, StartStrategy
from hpc_router.expert.staging.staging import NodeStaging
from hpc_router.net import addresses
from hpc_router.net.auth import new_token, replica_key
from hpc_router.net.job_environment import WARNING_SIGNALS, current_job_id
from hpc_router.relay import memory_tuning
from hpc_router.relay.downstream.server import listening
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.relay.upstream.interface import Upstream
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_expiry import JobExpiry
from hpc_router.state.job_records import Exit, FailureReason, JobDir, JobPhase
from hpc_router.state.lease import Lease
from hpc_router.state.registry import Record, RecordKind, State, http_url, split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

REMOVAL_CHECK_BEATS: Final = 5
"""Number of heartbeats between two checks whether this replica was removed. Slurm, for example, gives up a job whose
node it cannot reach, although the job may still run there."""
_MIB: Final = 2**20


class Agent:
    """Runs a replica's job. `run` returns when the job is over. `drain` can be called at any time, also repeatedly."""

    def __init__(
        self, run: RunDir, replica: str, deployment: Deployment, *, files: FileThread, environment: Mapping[str, str]
    ) -> None:
        expert, _, self._generation = split_replica(replica)
        self._run = run
        self._job = JobDir(run, replica)
        self._deployment = deployment
        self._config = deployment.experts[expert]
        self._engine: Engine = build_engine(expert, self._config, adapters=adapters_of(deployment.experts, expert))
        self._files = files
        self._environment = environment
        self._commands = EngineCommands(
            self._engine, self._config, deployment.cluster, environment, self._job.engine_log
        )
        self._staging = NodeStaging(
            self._engine,
            deployment.cluster,
            environment,
            limit_s=self._config.engine.startup_timeout_s,
            on_report=self._write_progress,
        )
        self._place: Place
        self._address = ""
        self._version: str | None = None  # of the engine
        self._leader: MultiNodeLeader | None = None
        self._nonce = new_token()
        self._lifecycle = JobLifecycle(stage=self._staging.report)
        self._draining = asyncio.Event()
        self._drain_reason = ""
        self._drain_until_at: float | None = None
        self._by_signal = False  # whether a signal caused the drain; our own commands send signals too
        self._signals: set[signal.Signals] = set()
        # A rank that was lost before the drain: Slurm ends the job when a node fails.
        self._rank_failure: EngineFailure | None = None
        self._aborted = 0  # responses that did not finish before the end of the drain
        self._http_api: AgentHttpApi | None = None
        self._failures = TaskFailures()
        self._lease: Lease | None = None

    def signalled(self, number: signal.Signals) -> None:
        """Drains after a signal. SIGINT comes from a terminal; WARNING_SIGNALS announce the end of the walltime."""
        self._signals.add(number)
        self.drain(number.name, by_signal=number is not signal.SIGINT)

    def drain(self, why: str, *, by_signal: bool = False, until_at: float | None = None) -> None:
        """Refuses new requests, and makes `run` return when the requests in flight have ended. Later calls have no
        effect. `why`: reason for the log and the exit record. `by_signal`: whether a signal from outside is the cause.
        `until_at`: in a handover, the Unix time until which the drain may last."""
        if not self._draining.is_set():
            logger.info("draining: %s", why)
            failure = self._lifecycle.failure
            if failure is not None and self._lifecycle.phase is JobPhase.RESTARTING:
                self._rank_failure = failure if failure.reason is FailureReason.RANK_LOST else None
            self.phase_changed(JobPhase.DRAINING, engine_pid=self._lifecycle.engine_pid)
            self._drain_reason, self._by_signal, self._drain_until_at = why, by_signal, until_at
            self._draining.set()

    def phase_changed(
        self, phase: JobPhase, *, failure: EngineFailure | None = None, engine_pid: int | None = None
    ) -> None:
        """Enters a phase: updates the HTTP API, the record and the progress file. Does nothing once the agent drains.
        `failure`: why the engine's last process ended; `engine_pid`: process id of the present one."""
        if self._draining.is_set():
            return
        self._lifecycle.move(phase, failure=failure, engine_pid=engine_pid)
        if self._http_api is not None:
            self._http_api.state = self._lifecycle.state
            if phase is JobPhase.READY:
                self._http_api.models = tuple(self._engine.names())
        if self._lease is not None and self._lease.record.state is not self._lifecycle.state:
            self._lease.change(state=self._lifecycle.state)
        self._write_progress()

    def _write_progress(self) -> None:
        self._files.post(partial(self._job.write, self._lifecycle.progress()))

    def _publish_loaded(self, loaded: LoadedEngine) -> None:
        if self._lease is not None:
            info = self._lease.record.engine
            caching = info.prefix_caching if loaded.prefix_caching is None else loaded.prefix_caching
            engine = replace(info, max_model_len=loaded.max_model_len, prefix_caching=caching)
            self._lease.change(engine=engine, load_s=loaded.load_s)

    async def run(self) -> Exit:
        """Runs the job until its end, writes its exit record and returns that record."""
        try:
            end = await self._serve_job()
        except ConfigError as error:
            end = Exit(ok=False, reason=FailureReason.BAD_OPTION, message=str(error))
        except HpcRouterError as error:
            end = Exit(ok=False, reason=FailureReason.CRASHED, message=str(error))
        except Exception as error:  # the exit record has to name any cause
            logger.exception("the agent failed")
            end = Exit(ok=False, reason=FailureReason.CRASHED, message=f"{type(error).__name__}: {error}")
        logger.info("exit: %s: %s", end.reason, end.message)
        await self._files.run_within_limit(partial(self._job.write_exit, end))
        return end

    async def _serve_job(self) -> Exit:
        cluster, router = self._deployment.cluster, self._deployment.router
        async with AsyncExitStack() as stack:
            self._address = addresses.address(cluster.fabric, kind=cluster.kind)
            self._place = stack.enter_context(scratch_folder(expanded(cluster.scratch, self._environment)))
            self._version = await self._commands.version(self._place)
            await stack.enter_async_context(self._staging)
            client = await stack.enter_async_context(UpstreamClient(ENGINE_LIMITS, socket_path=str(self._place.socket)))
            strategy = self._start_strategy()
            http_api = self._make_http_api(client)
            sock = stack.enter_context(bind(self._address))
            max_body = int((router.max_body_mb + 1) * _MIB)  # the router's limit comes first
            await stack.enter_async_context(listening(http_api.handle, sock, max_body=max_body))
            record = self._record(sock)
            self._write_progress()
            lease = Lease(
                self._run.registry,
                record,
                self._files,
                expires_at=JobExpiry(self._run, self._environment).read,
                on_gone=lambda: self.drain("its run directory was removed"),
                on_failure=self._failures.note,
            )
            self._lease = await stack.enter_async_context(lease)
            self._http_api = http_api
            http_api.state = self._lifecycle.state
            logger.info("%s listens at %s", record.replica, record.url)
            memory_tuning.tune_for_relay()
            failure = await self._serve(self._supervisor(strategy, client, http_api), http_api) or self._rank_failure
            if failure is not None and failure.reason is FailureReason.WEIGHTS:
                self._staging.drop_copies()
        if failure is not None:
            return Exit(ok=False, reason=failure.reason, message=failure.message)
        return await self._drained()

    async def _drained(self) -> Exit:
        """Returns the exit record after a drain. It is "failed" if a signal caused the drain and the engine had never
        been ready, unless a command had ordered the job to stop; otherwise it is "drained"."""
        requested = self._lifecycle.ready_at is not None or not self._by_signal
        if requested or await self._files.run_within_limit(self._job.stop) is not None:
            return Exit.drained(f"drained after {self._drain_reason}", cut=self._aborted)
        if not self._signals.isdisjoint(WARNING_SIGNALS):
            message = "its walltime ended before its engine was ready: raise walltime, or shorten the start"
            return Exit(ok=False, reason=FailureReason.WALLTIME, message=message)
        message = "it was ended from outside before it was ready"
        return Exit(ok=False, reason=FailureReason.CANCELLED, message=message)

    async def _serve(self, supervisor: EngineSupervisor, http_api: AgentHttpApi) -> EngineFailure | None:
        """Serves until the engine fails permanently or the drain is complete. Returns the failure, or None after a
        drain. The engine has ended by then."""
        supervision = asyncio.create_task(self._start_and_supervise(supervisor), name="supervisor")
        draining = asyncio.create_task(self._draining.wait(), name="drain")
        removal = restarting("wanted", self._watch_for_removal, self._failures.note)
        watching = asyncio.create_task(removal, name="wanted")
        try:
            await asyncio.wait({supervision, draining}, return_when=asyncio.FIRST_COMPLETED)
            if supervision.done():
                return supervision.result()
            unfinished_before = http_api.unfinished
            try:
                async with asyncio.timeout(self._drain_limit_s()):
                    await http_api.in_flight.idle()
            except TimeoutError:
                logger.warning("%d requests did not end within the drain: aborted", http_api.in_flight.count)
            self._aborted = http_api.unfinished - unfinished_before + http_api.in_flight.count
            return None
        finally:
            supervision.cancel()
            draining.cancel()
            watching.cancel()
            if self._leader is not None:
                self._rank_failure = await self._leader.stop_ranks() or self._rank_failure
            await asyncio.gather(supervision, draining, watching, return_exceptions=True)

    def _drain_limit_s(self) -> float:
        """Returns the time limit of the drain in seconds: `cluster.drain_s`; in a handover, the time until `until_at`
        if that is longer."""
        left_s = 0.0 if self._drain_until_at is None else self._drain_until_at - time.time()
        return max(self._deployment.cluster.drain_s, left_s)

    async def _start_and_supervise(self, supervisor: EngineSupervisor) -> EngineFailure:
        self._place = await self._staging.prepare(self._place, version=self._version)
        return await supervisor.run()

    def _command(self, ranks: Ranks | None = None) -> Command:
        """Returns the command of the engine's next start. `ranks`: the rank to start; None for an engine on one node.
        If the engine has crashed before it was ever ready, the command uses an empty compile cache."""
        failure = self._lifecycle.failure
        if failure is not None and failure.reason is FailureReason.CRASHED and self._lifecycle.ready_at is None:
            self._place = self._staging.without_cache(self._place)
        return self._commands.at(replace(self._place, ranks=ranks), version=self._version)

    async def _watch_for_removal(self) -> None:
        """Checks repeatedly whether this replica was removed, and drains if so. If the file system hangs, nothing but
        this check waits for it."""
        why = None
        while why is None:
            await asyncio.sleep(REMOVAL_CHECK_BEATS * self._deployment.cluster.beat_s)
            why = await self._files.run(self._removal_reason)
        self.drain(why)

    def _removal_reason(self) -> str | None:
        """Returns why this replica was removed; None if it was not, or if the files cannot be read."""
        if (end := self._job.exit()) is not None:  # our own exit record is written later
            return f"its job was given up: {end.message}"
        if self._job.ended() is not None:
            return "its batch script had ended"
        with suppress(RegistryError):
            if self._run.read_desired().get("down") is True:
                return "the deployment was taken down"
        return None

    def _make_http_api(self, client: Upstream) -> AgentHttpApi:
        return AgentHttpApi(
            replica=self._job.replica,
            key=replica_key(self._run.secret(), self._nonce),
            capacity=self._config.capacity,
            client=client,
            names=tuple(self._engine.names()),
            lists_models=self._engine.lists_models,
            on_drain=lambda why, until_at: self.drain(why, until_at=until_at),
            on_rank=None if self._leader is None else self._leader.on_report,
            rank_token=None if self._leader is None else report_token(self._leader.key),
            failures=self._failures,
        )

    def _start_strategy(self) -> StartStrategy:
        nodes = self._config.resources.nodes
        if nodes == 1:
            return SingleNode(self._command)
        self._leader = MultiNodeLeader(
            nodes=nodes,
            key=rank_key(self._run.secret(), self._nonce),
            address=self._address,
            interface=addresses.interface_of(self._address),
            beat_s=self._deployment.cluster.beat_s,
            command=self._command,
            on_drain=partial(self.drain, by_signal=True),
            clock=asyncio.get_running_loop().time,
        )
        return self._leader

    def _supervisor(self, strategy: StartStrategy, client: Upstream, http_api: AgentHttpApi) -> EngineSupervisor:
        config = self._config.engine
        return EngineSupervisor(
            engine=self._engine,
            strategy=strategy,
            client=client,
            files=self._files,
            observer=self,
            restarts=RestartPolicy(config.max_restarts),
            startup_timeout_s=config.startup_timeout_s,
            progress=lambda: http_api.progress,
            engine_lost=http_api.engine_lost,
            break_off=http_api.break_off,
            on_loaded=self._publish_loaded,
        )

    def _record(self, sock: socket.socket) -> Record:
        host, port = sock.getsockname()[:2]
        return Record(
            kind=RecordKind.EXPERT,
            replica=self._job.replica,
            url=http_url(host, port),
            state=State.STARTING,
            serves=self._engine.serves(),
            generation=self._generation,
            nonce=self._nonce,
            job_id=self._job_id(),
            node=socket.gethostname(),
            beat_s=self._deployment.cluster.beat_s,
            capacity=self._config.capacity,
            engine=replace(self._engine.info(), version=self._version),
            accepts=self._engine.accepts,
        )

    def _job_id(self) -> str:
        if job_id := current_job_id(self._environment) or self._environment.get("SUBMITIT_LOCAL_JOB_ID"):
            return job_id
        info = self._job.info()
        return info.job_id if info else str(os.getpid())


def bind(address: str) -> socket.socket:
    """Returns a socket bound to `address` on a port that the kernel chooses."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.bind((address, 0))
    except OSError as error:
        sock.close()
        key = addresses.KEY
        raise ConfigError(f"{key}: cannot listen at {address}: {error.strerror}", key=key) from error
    return sock
