"""The job body on every node but the first of an engine that spans nodes: it runs this rank's process for rank 0.

Rules: it has no record and no port. It finds rank 0's agent in the registry and reports this rank's state to it every
half beat; the responses are the orders. Without an order for `SILENCE_BEATS` the engine is ended, because rank 0 has
then given this rank up as well; without one for `LEADER_LOST_BEATS`, or once rank 0 has written its exit record, this
process ends. A signal alone ends nothing, because rank 0 has requests in flight that need this rank: rank 0 is told,
and it drains.
"""

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Final

from hpc_router.config.adapters import adapters_of
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, HpcRouterError, UpstreamError
from hpc_router.expert.engine_process.command import EngineCommands
from hpc_router.expert.engine_process.scratch_dir import expanded, scratch_folder
from hpc_router.expert.engines import Place, Ranks, build_engine
from hpc_router.expert.multinode.rank_auth import is_proven, rank_key, report_token
from hpc_router.expert.multinode.rank_engine import RankEngine
from hpc_router.expert.multinode.rank_group import ASSEMBLE_BEATS, SILENCE_BEATS
from hpc_router.expert.staging.staging import NodeStaging
from hpc_router.net import addresses
from hpc_router.net.auth import new_token
from hpc_router.net.protocol import RANK, Action, RankOrder, RankReport
from hpc_router.relay.headers import lines
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.relay.upstream.interface import Upstream, UpstreamTimeouts, address_of
from hpc_router.state.io_thread import WRITE_TIMEOUT_S, FileThread
from hpc_router.state.job_records import Exit, FailureReason, JobDir
from hpc_router.state.registry import Record, RegistryReader, split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

LEADER_LOST_BEATS: Final = 30
_MAX_ORDER_BYTES: Final = 64 * 1024


class Follower:
    """`run` is the whole life of this rank; `signalled` can be called at any time, repeatedly."""

    def __init__(
        self,
        run: RunDir,
        replica: str,
        deployment: Deployment,
        *,
        rank: int,
        files: FileThread,
        environment: Mapping[str, str],
    ) -> None:
        self._run = run
        self._job = JobDir(run, replica)
        self._rank = rank
        self._cluster = deployment.cluster
        self._files = files
        self._environment = environment
        expert = split_replica(replica)[0]
        config = deployment.experts[expert]
        log = self._job.engine_log.with_name(f"{replica}.rank{rank}.engine.log")
        self._nodes = config.resources.nodes
        engine = build_engine(expert, config, adapters=adapters_of(deployment.experts, expert))
        self._commands = EngineCommands(engine, config, deployment.cluster, environment, log)
        limit_s = config.engine.startup_timeout_s
        self._staging = NodeStaging(engine, deployment.cluster, environment, limit_s=limit_s)
        self._place: Place | None = None  # known once the models are staged
        self._engine = RankEngine(self._commands.engine, files)
        self._reader = RegistryReader(run.registry)
        self._leader: Record | None = None
        self._secret = run.secret()
        self._instance = new_token()
        self._address = ""
        self._leaving = False

    def signalled(self, number: signal.Signals) -> None:
        if not self._leaving:
            logger.info("%s: rank 0 is asked to drain", number.name)
            self._leaving = True

    async def run(self) -> Exit:
        """Returns how it ended. Rank 0 writes the replica's exit record as long as both are alive."""
        try:
            end = await self._serve()
        except ConfigError as error:
            end = await self._failed(FailureReason.BAD_OPTION, str(error))
        except HpcRouterError as error:
            end = await self._failed(FailureReason.CRASHED, str(error))
        except Exception as error:  # rank 0 only sees that this rank is gone
            logger.exception("rank %d failed", self._rank)
            end = await self._failed(FailureReason.CRASHED, f"{type(error).__name__}: {error}")
        logger.info("exit: %s: %s", end.reason, end.message)
        return end

    async def _failed(self, reason: FailureReason, message: str) -> Exit:
        """Write the exit record at once: rank 0 is ended together with this rank and does not know the cause."""
        end = Exit(ok=False, reason=reason, message=f"rank {self._rank} on {socket.gethostname()}: {message}")
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                if await self._files.run(self._job.exit) is None:
                    await self._files.run(partial(self._job.write, end))
        return end

    async def _serve(self) -> Exit:
        cluster = self._cluster
        limits = UpstreamTimeouts(2 * cluster.beat_s, 2 * cluster.beat_s, 2 * cluster.beat_s)
        self._address = addresses.address(cluster.fabric, kind=cluster.kind)
        async with AsyncExitStack() as stack:
            place = stack.enter_context(scratch_folder(expanded(cluster.scratch, self._environment)))
            client = await stack.enter_async_context(UpstreamClient(limits))
            await stack.enter_async_context(self._staging)
            await stack.enter_async_context(self._engine)
            staging = asyncio.create_task(self._stage(place), name="staging")
            try:
                return await self._follow(client)
            finally:
                staging.cancel()
                await asyncio.gather(staging, return_exceptions=True)

    async def _stage(self, place: Place) -> None:
        """Stage the models while rank 0 does; an attempt that it begins before waits for this rank."""
        version = None if self._cluster.stage_to is None else await self._commands.version(place)
        self._place = await self._staging.prepare(place, version=version)

    async def _follow(self, client: Upstream) -> Exit:
        clock, beat_s = asyncio.get_running_loop().time, self._cluster.beat_s
        last_order_at, give_up_s = clock(), ASSEMBLE_BEATS * beat_s
        while True:
            order = await self._request_order(client)
            silent_s = clock() - last_order_at
            if order is not None:
                last_order_at, give_up_s = clock(), LEADER_LOST_BEATS * beat_s
                if order.action is Action.STOP:
                    return Exit(ok=True, reason=FailureReason.DRAINED, message="rank 0 ordered it to stop")
                self._apply(order)
            elif (end := await self._exit_record()) is not None:
                return end
            elif silent_s >= give_up_s:
                return await self._leader_lost(silent_s)
            elif silent_s >= SILENCE_BEATS * beat_s:
                self._engine.end("no order from rank 0")
            await asyncio.sleep(beat_s / 2)

    def _apply(self, order: RankOrder) -> None:
        if order.action is Action.WAIT or (self._engine.running and order.attempt != self._engine.attempt):
            self._engine.end("ordered by rank 0")
        elif order.attempt != self._engine.attempt and self._place is not None:
            if self._engine.failure is not None and self._engine.failure.reason is FailureReason.CRASHED:
                self._place = self._staging.without_cache(self._place)
            here = self._address
            rendezvous = (order.master_address, order.master_port)
            ranks = Ranks(self._rank, self._nodes, here, addresses.interface_of(here), *rendezvous)
            self._engine.start(order.attempt, self._commands.at(replace(self._place, ranks=ranks)))

    async def _request_order(self, client: Upstream) -> RankOrder | None:
        """Rank 0's order; None if there was no valid response. Its record is read again after every failure."""
        if self._leader is None:
            self._leader = await self._find_leader()
        leader = self._leader
        if leader is None or leader.nonce is None:
            return None
        key, report = rank_key(self._secret, leader.nonce), self._report()
        head = lines({"authorization": f"Bearer {report_token(key)}", "content-type": "application/json"})
        body = json.dumps(asdict(report)).encode()
        self._leader = None
        try:
            async with client.request("POST", address_of(leader.url), RANK, head=head, body=body) as answer:
                if answer.status != 200:
                    logger.warning("rank 0 refuses this rank's report: status %d", answer.status)
                    return None
                order = RankOrder.from_json(json.loads(await answer.read(_MAX_ORDER_BYTES)))
            if not is_proven(key, report.challenge, order):
                raise ValueError("the order is not signed by rank 0")
        except (UpstreamError, ValueError) as error:
            logger.warning("no answer from rank 0: %s", error)
            return None
        self._leader = leader
        return order

    def _report(self) -> RankReport:
        engine = self._engine
        return RankReport(
            self._rank,
            self._instance,
            new_token(),
            socket.gethostname(),
            engine.attempt,
            engine.state,
            None if engine.failure is None else engine.failure.reason.value,
            None if engine.failure is None else engine.failure.message,
            self._leaving,
        )

    async def _find_leader(self) -> Record | None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                return (await self._files.run(self._reader.snapshot)).get(self._job.replica)
        except (OSError, TimeoutError):
            return None

    async def _exit_record(self) -> Exit | None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                return await self._files.run(self._job.exit)
        except (OSError, TimeoutError):
            return None

    async def _leader_lost(self, silent_s: float) -> Exit:
        """Rank 0 is gone without an exit record, so this rank writes one for the replica."""
        message = f"rank 0 gave no order for {silent_s:.0f} s to rank {self._rank} on {socket.gethostname()}"
        end = Exit(ok=False, reason=FailureReason.RANK_LOST, message=message)
        self._files.post(partial(self._job.write, end))
        return end
