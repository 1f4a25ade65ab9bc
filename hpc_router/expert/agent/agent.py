"""The job body of a replica, from its port to its exit record; read `Agent._live` first.

Listen, publish, start the engine, serve until told to drain, until nobody wants it any more or until the engine fails
for good, then take all of it down in reverse. File writes go through one thread of their own: a shared file system
that hangs stops nobody.
"""

import asyncio
import logging
import os
import signal
import socket
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
from hpc_router.expert.agent.engine_supervisor import EngineSupervisor
from hpc_router.expert.agent.http_api import AgentHttpApi
from hpc_router.expert.agent.lifecycle import JobLifecycle
from hpc_router.expert.agent.restart_policy import Restarts
from hpc_router.expert.engine_process.command import Commands
from hpc_router.expert.engine_process.scratch_dir import expanded, scratch_folder
from hpc_router.expert.engines import Engine, EngineFailure, Place, build_engine
from hpc_router.expert.multinode.rank_auth import rank_key, report_token
from hpc_router.expert.multinode.start_strategy import MultiNodeLeader, SingleNode, StartStrategy
from hpc_router.net import addresses
from hpc_router.net.auth import new_token, replica_key
from hpc_router.relay import memory_tuning
from hpc_router.relay.downstream.server import listening
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.relay.upstream.interface import Upstream
from hpc_router.state.io_thread import PATIENCE_S, FileThread
from hpc_router.state.job_records import Exit, FailureReason, JobDir, JobPhase
from hpc_router.state.lease import Lease
from hpc_router.state.registry import Record, RecordKind, State, http_url, split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

WANTED_BEATS: Final = 5
"""So often the agent looks whether it is still wanted: Slurm gives a job up whose node it cannot reach."""
_MIB: Final = 2**20


class Agent:
    """`run` lives the whole life; `drain` may be called at any time, and again."""

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
        self._commands = Commands(self._engine, self._config, deployment.cluster, environment, self._job.engine_log)
        self._address = ""
        self._version: str | None = None  # of the engine
        self._leading: MultiNodeLeader | None = None
        self._nonce = new_token()
        self._life = JobLifecycle()
        self._draining = asyncio.Event()
        self._drain_reason = ""
        self._from_outside = False  # the drain: by whoever may signal a job, perhaps us
        self._signals: set[signal.Signals] = set()
        self._lost: EngineFailure | None = None  # a rank, when the drain came: Slurm ends the job of a node that failed
        self._cut = 0  # answers that the drain did not let finish
        self._gate: AgentHttpApi | None = None
        self._failures = TaskFailures()
        self._lease: Lease | None = None

    def signalled(self, number: signal.Signals) -> None:
        """Drain. SIGINT is the user's at a terminal, SIGUSR2 Slurm's warning before the walltime ends."""
        self._signals.add(number)
        self.drain(number.name, from_outside=number is not signal.SIGINT)

    def drain(self, why: str, *, from_outside: bool = False) -> None:
        """New requests are refused from now on; `run` returns when those in flight have ended."""
        if not self._draining.is_set():
            logger.info("draining: %s", why)
            if self._life.phase is JobPhase.RESTARTING and self._life.failure is not None:
                self._lost = self._life.failure if self._life.failure.reason is FailureReason.RANK_LOST else None
            self.moved(JobPhase.DRAINING, engine_pid=self._life.engine_pid)
            self._drain_reason, self._from_outside = why, from_outside
            self._draining.set()

    def moved(self, phase: JobPhase, *, failure: EngineFailure | None = None, engine_pid: int | None = None) -> None:
        """The supervisor's steps and our own: gate, record and progress follow. Draining is the last one."""
        if self._draining.is_set():
            return
        self._life.move(phase, failure=failure, engine_pid=engine_pid)
        if self._gate is not None:
            self._gate.state = self._life.state
            if phase is JobPhase.READY:
                self._gate.models = tuple(self._engine.names())
        if self._lease is not None and self._lease.record.state is not self._life.state:
            self._lease.change(state=self._life.state)
        self._files.post(partial(self._job.write, self._life.progress()))

    async def run(self) -> Exit:
        """The exit record, which has been written."""
        try:
            end = await self._live()
        except ConfigError as error:
            end = Exit(ok=False, reason=FailureReason.BAD_OPTION, message=str(error))
        except HpcRouterError as error:
            end = Exit(ok=False, reason=FailureReason.CRASHED, message=str(error))
        except Exception as error:  # whatever it was, the job's owner must learn of it
            logger.exception("the agent failed")
            end = Exit(ok=False, reason=FailureReason.CRASHED, message=f"{type(error).__name__}: {error}")
        logger.info("exit: %s: %s", end.reason, end.message)
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._files.run(partial(self._leave, end))
        return end

    def _leave(self, end: Exit) -> None:
        """What others left of our end stands: it has been acted on."""
        if self._job.exit() is None:
            self._job.write(end)

    async def _live(self) -> Exit:
        cluster, router = self._deployment.cluster, self._deployment.router
        async with AsyncExitStack() as stack:
            self._address = addresses.address(cluster.fabric, kind=cluster.kind)
            place = stack.enter_context(scratch_folder(expanded(cluster.scratch, self._environment)))
            self._version = await self._commands.version(place)
            client = await stack.enter_async_context(UpstreamClient(ENGINE_LIMITS, socket_path=str(place.socket)))
            attempts = self._attempts(place)
            gate = self._make_gate(client)
            sock = stack.enter_context(bind(self._address))
            max_body = int((router.max_body_mb + 1) * _MIB)  # the router's limit comes first
            await stack.enter_async_context(listening(gate.handle, sock, max_body=max_body))
            record = self._record(sock)
            self._files.post(partial(self._job.write, self._life.progress()))
            lease = Lease(
                self._run.registry,
                record,
                self._files,
                on_gone=lambda: self.drain("its run directory was removed"),
                on_failure=self._failures.note,
            )
            self._lease = await stack.enter_async_context(lease)
            self._gate = gate
            gate.state = self._life.state
            logger.info("%s listens at %s", record.replica, record.url)
            memory_tuning.tune_for_relay()
            failure = await self._serve(self._supervisor(attempts, client, gate), gate) or self._lost
        if failure is not None:
            return Exit(ok=False, reason=failure.reason, message=failure.message)
        return await self._drained()

    async def _drained(self) -> Exit:
        """A job that was ended from outside before it ever served has failed, whatever ended it."""
        if self._life.ready_at is not None or not self._from_outside or await self._asked():
            return Exit.drained(f"drained after {self._drain_reason}", cut=self._cut)
        if signal.SIGUSR2 in self._signals:
            said = "its walltime ended before its engine was ready: raise walltime, or shorten the start"
            return Exit(ok=False, reason=FailureReason.WALLTIME, message=said)
        said = "it was asked to end from outside before it was ready"
        return Exit(ok=False, reason=FailureReason.CANCELLED, message=said)

    async def _asked(self) -> bool:
        """Whether it was us who asked this job to end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                return await self._files.run(self._job.stop) is not None
        return False

    async def _serve(self, supervisor: EngineSupervisor, gate: AgentHttpApi) -> EngineFailure | None:
        """Until the engine fails for good (its failure) or the drain is complete (None); the engine has ended then."""
        supervising = asyncio.create_task(supervisor.run(), name="supervisor")
        draining = asyncio.create_task(self._draining.wait(), name="drain")
        wanted = restarting("wanted", self._until_unwanted, self._failures.note)
        watching = asyncio.create_task(wanted, name="wanted")
        try:
            await asyncio.wait({supervising, draining}, return_when=asyncio.FIRST_COMPLETED)
            if supervising.done():
                return supervising.result()
            cut_before = gate.cut
            try:
                async with asyncio.timeout(self._deployment.cluster.drain_s):
                    await gate.in_flight.idle()
            except TimeoutError:
                logger.warning("%d requests did not end within cluster.drain_s: cut off", gate.in_flight.count)
            self._cut = gate.cut - cut_before + gate.in_flight.count
            return None
        finally:
            supervising.cancel()
            draining.cancel()
            watching.cancel()
            if self._leading is not None:
                self._lost = await self._leading.dismiss() or self._lost
            await asyncio.gather(supervising, draining, watching, return_exceptions=True)

    async def _until_unwanted(self) -> None:
        """Drain then. While the file system hangs, one look waits for it."""
        why = None
        while why is None:
            await asyncio.sleep(WANTED_BEATS * self._deployment.cluster.beat_s)
            why = await self._files.run(self._unwanted)
        self.drain(why)

    def _unwanted(self) -> str | None:
        """Why nobody wants this replica any more; None also for files that cannot be read."""
        if (end := self._job.exit()) is not None:  # our own comes when we have left
            return f"its job was given up: {end.message}"
        if self._job.ended() is not None:
            return "its batch script had ended"
        with suppress(RegistryError):
            if self._run.read_desired().get("down") is True:
                return "the deployment was taken down"
        return None

    def _make_gate(self, client: Upstream) -> AgentHttpApi:
        return AgentHttpApi(
            replica=self._job.replica,
            key=replica_key(self._run.secret(), self._nonce),
            capacity=self._config.capacity,
            client=client,
            names=tuple(self._engine.names()),
            lists_models=self._engine.lists_models,
            on_drain=self.drain,
            on_rank=None if self._leading is None else self._leading.hear,
            rank_token=None if self._leading is None else report_token(self._leading.key),
            failures=self._failures,
        )

    def _attempts(self, place: Place) -> StartStrategy:
        nodes = self._config.resources.nodes
        if nodes == 1:
            return SingleNode(self._commands.at(place, version=self._version))
        self._leading = MultiNodeLeader(
            nodes=nodes,
            key=rank_key(self._run.secret(), self._nonce),
            address=self._address,
            interface=addresses.interface(self._address),
            beat_s=self._deployment.cluster.beat_s,
            command=lambda ranks: self._commands.at(replace(place, ranks=ranks), version=self._version),
            on_drain=partial(self.drain, from_outside=True),
            clock=asyncio.get_running_loop().time,
        )
        return self._leading

    def _supervisor(self, attempts: StartStrategy, client: Upstream, gate: AgentHttpApi) -> EngineSupervisor:
        config = self._config.engine
        return EngineSupervisor(
            engine=self._engine,
            attempts=attempts,
            client=client,
            files=self._files,
            observer=self,
            restarts=Restarts(config.max_restarts),
            startup_timeout_s=config.startup_timeout_s,
            progress=lambda: gate.progress,
            engine_lost=gate.engine_lost,
            break_off=gate.break_off,
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
        )

    def _job_id(self) -> str:
        for name in ("HPC_ROUTER_JOB_ID", "SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID"):
            if name in self._environment:
                return self._environment[name]
        info = self._job.info()
        return info.job_id if info else str(os.getpid())


def bind(address: str) -> socket.socket:
    """A port that the kernel chose, on the address that is published."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.bind((address, 0))
    except OSError as error:
        sock.close()
        key = addresses.KEY
        raise ConfigError(f"{key}: cannot listen at {address}: {error.strerror}", key=key) from error
    return sock
