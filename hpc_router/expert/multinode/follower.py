"""The program that runs one rank of an engine on several nodes, on every node except the first.

Rules: a follower has no record and no port. It finds rank 0's agent in the registry and reports its state every half
beat; each response is an order. If it gets no order for `SILENCE_BEATS`, it ends its engine, because rank 0 has by then
declared this rank lost. It exits if it gets no order for `LEADER_LOST_BEATS`, or when rank 0 has written its exit
record. A signal alone does not end the engine, because rank 0 has requests in flight that need this rank. The follower
reports the signal to rank 0, which then drains.
"""

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
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
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_records import Exit, FailureReason, JobDir
from hpc_router.state.registry import Record, RegistryReader, split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

LEADER_LOST_BEATS: Final = 30
_MAX_ORDER_BYTES: Final = 64 * 1024


class Follower:
    """Runs one rank. `run` lasts until the rank ends. `signalled` can be called at any time and more than once."""

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
        """Records that a signal has arrived. The next report to rank 0 says so."""
        if not self._leaving:
            logger.info("%s: rank 0 is asked to drain", number.name)
            self._leaving = True

    async def run(self) -> Exit:
        """Runs the rank and returns how it ended. The replica's exit record is written by rank 0 if that is alive."""
        try:
            end = await self._serve()
        except ConfigError as error:
            end = await self._failed(FailureReason.BAD_OPTION, str(error))
        except HpcRouterError as error:
            end = await self._failed(FailureReason.CRASHED, str(error))
        except Exception as error:  # recorded, because rank 0 would see only that this rank is gone
            logger.exception("rank %d failed", self._rank)
            end = await self._failed(FailureReason.CRASHED, f"{type(error).__name__}: {error}")
        logger.info("exit: %s: %s", end.reason, end.message)
        return end

    async def _failed(self, reason: FailureReason, message: str) -> Exit:
        """Writes an exit record with this failure, and returns it. Writes it at once, because rank 0 ends when this
        rank does, and does not know the cause."""
        end = Exit(ok=False, reason=reason, message=f"rank {self._rank} on {socket.gethostname()}: {message}")
        await self._files.run_within_limit(partial(self._job.write_exit, end))
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
        """Copies the models to this node's disk, while rank 0 does the same on its node. If rank 0 begins an attempt
        before the copies are ready, the engine of this rank starts as soon as they are."""
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
            elif (end := await self._files.run_within_limit(self._job.exit)) is not None:
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
        """Reports to rank 0 and returns its order; None if there is no valid response. After that, the next call reads
        rank 0's record again, because rank 0 may have a new address."""
        if self._leader is None:
            records = await self._files.run_within_limit(self._reader.snapshot)
            self._leader = (records or {}).get(self._job.replica)
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

    async def _leader_lost(self, silent_s: float) -> Exit:
        """Writes and returns the replica's exit record, as rank 0 is gone. `silent_s`: seconds without an order."""
        message = f"rank 0 gave no order for {silent_s:.0f} s to rank {self._rank} on {socket.gethostname()}"
        end = Exit(ok=False, reason=FailureReason.RANK_LOST, message=message)
        self._files.post(partial(self._job.write, end))
        return end
