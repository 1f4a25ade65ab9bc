"""Agents as real processes with simulated engines, and the state that callers see."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from hpc_router.config import frozen
from hpc_router.config.schema import (
    ClusterConfig,
    Deployment,
    EngineConfig,
    ExpertConfig,
    PolicyConfig,
    ResourceConfig,
)
from hpc_router.expert.engine_process.guard import descendants
from hpc_router.expert.job import RANK
from hpc_router.net import protocol
from hpc_router.net.auth import replica_key
from hpc_router.state.job_records import JobDir, JobPhase, JobProgress
from hpc_router.state.registry import Record, RegistryReader, State
from hpc_router.state.run_directory import RunDir
from tests.support.waiting import GUARD_S, eventually

REPLICA = "math-0.g1"


def deployment(scratch: Path, *, options: dict[str, Any] | None = None, nodes: int = 1, **engine: Any) -> Deployment:
    """Returns a deployment with one expert. `nodes`: more than one are ranks on this machine, over the loopback
    network."""
    quick = {"ttft_ms": 0.0, "itl_ms": 0.0, "extra": {"drain-s": 0}} | (options or {})
    math = ExpertConfig(
        model="m", engine=EngineConfig(kind="sim", options=quick, **engine), resources=ResourceConfig(nodes=nodes)
    )
    cluster = ClusterConfig(scratch=str(scratch), drain_s=GUARD_S, beat_s=0.05)
    if nodes > 1:
        cluster = replace(cluster, kind="slurm", fabric="127.0.0.1", trusted_network=True, beat_s=0.2)
    return Deployment(
        experts={"math": math},
        cluster=cluster,
        policy=PolicyConfig(kind="model_field"),
    )


@dataclass
class Replica:
    process: asyncio.subprocess.Process
    run: RunDir

    @property
    def job(self) -> JobDir:
        return JobDir(self.run, REPLICA)

    @property
    def record(self) -> Record | None:
        return RegistryReader(self.run.registry).snapshot().get(REPLICA)

    async def reached(self, phase: JobPhase, *, after: JobProgress | None = None) -> JobProgress:
        """Waits for a phase and returns the progress. `after`: the agent must have restarted the engine since then.

        The number of restarts is not checked: on a busy machine a rank may be silent for a second, which restarts the
        engine.
        """

        def look() -> JobProgress | None:
            progress = self.job.progress()
            assert self.process.returncode is None or phase is JobPhase.DRAINING, self.log()
            if progress is None or progress.pid != self.process.pid or progress.phase is not phase:
                return None
            return progress if after is None or progress.restarts > after.restarts else None

        progress: JobProgress = await eventually(look)
        return progress

    async def ready(self, *, after: JobProgress | None = None) -> tuple[JobProgress, Record]:
        progress = await self.reached(JobPhase.READY, after=after)
        record = await eventually(lambda: (r := self.record) and r.state is State.READY and r)
        assert isinstance(record, Record)
        return progress, record

    @asynccontextmanager
    async def session(self) -> AsyncIterator[aiohttp.ClientSession]:
        record = self.record
        assert record is not None
        assert record.nonce is not None
        key = replica_key(self.run.secret(), record.nonce)
        async with aiohttp.ClientSession(record.url, headers={"authorization": f"Bearer {key}"}) as session:
            yield session

    async def end(self) -> int:
        async with asyncio.timeout(GUARD_S):
            return await self.process.wait()

    def log(self) -> str:
        paths = sorted(self.run.logs.glob(f"{REPLICA}.*log"))
        return "\n".join(path.read_text() for path in paths)


@asynccontextmanager
async def replica(run: RunDir, configured: Deployment) -> AsyncIterator[Replica]:
    """Starts an agent, and kills it at the end if it still runs."""
    run.config.write_text(frozen.to_yaml(configured))
    argv = [sys.executable, "-m", "hpc_router.expert", "--run", str(run.path), "--replica", REPLICA]
    process = await asyncio.create_subprocess_exec(*argv)
    try:
        yield Replica(process, run)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(GUARD_S):
            await process.wait()


@asynccontextmanager
async def ranks(run: RunDir, configured: Deployment) -> AsyncIterator[tuple[Replica, list[asyncio.subprocess.Process]]]:
    """Starts an agent and the followers of its other ranks, which end with it."""
    run.config.write_text(frozen.to_yaml(configured))
    async with AsyncExitStack() as stack:
        others = [await stack.enter_async_context(rank(run, number)) for number in range(1, _nodes(configured))]
        yield await stack.enter_async_context(replica(run, configured)), others


def _nodes(configured: Deployment) -> int:
    return configured.experts["math"].resources.nodes


@asynccontextmanager
async def rank(run: RunDir, number: int) -> AsyncIterator[asyncio.subprocess.Process]:
    argv = [sys.executable, "-m", "hpc_router.expert", "--run", str(run.path), "--replica", REPLICA]
    process = await asyncio.create_subprocess_exec(*argv, env={**os.environ, RANK: str(number)})
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "math", "messages": [{"role": "user", "content": "two and two"}], **more}


@asynccontextmanager
async def half_a_stream(session: aiohttp.ClientSession, *, for_s: float) -> AsyncIterator[aiohttp.ClientResponse]:
    """Opens a stream that pauses for `for_s` seconds after its third token."""
    body = chat(stream=True, max_tokens=8, sim_fault={"kind": "hang", "at": 3, "for_s": for_s})
    async with session.post(protocol.CHAT, json=body) as response:
        assert response.status == 200
        await response.content.readuntil(b"\n\n")
        yield response


def processes_below(process: asyncio.subprocess.Process) -> list[int]:
    """Returns the process ids of an agent's guard and engine."""
    return descendants(process.pid)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
