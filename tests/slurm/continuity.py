"""A load on a deployment of the test cluster, half of it through `hpc_router.client` and half through `hpc-router
connect`, and what failed of it in a time."""

import asyncio
import contextlib
import itertools
import json
import math
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import openai

from hpc_router.client import async_openai_client
from hpc_router.net.http_client import Unreachable, call, session
from tests.slurm.deployment import OnSlurm
from tests.support.load import Failure, Load

TIMEOUT_S = 120
SAMPLE_S = 1.0
_UNREADY = re.compile(r'^hpc_router_unready_seconds_total\{expert="(.+)"\} (\S+)$', re.MULTILINE)


@dataclass
class Service:
    """`unready_s`: what each router measured so far, by router and expert. `began_at`, `ended_at`: of the load
    (monotonic)."""

    deployed: OnSlurm
    loads: tuple[Load, ...]
    unready_s: dict[tuple[str, str], float] = field(default_factory=dict)
    began_at: float = field(default_factory=time.monotonic)
    ended_at: float = math.inf

    def failures(self, kind: str, *, since: float = 0.0, until: float = math.inf) -> list[Failure]:
        """`since`, `until`: monotonic."""
        return [f for load in self.loads for f in load.failures if f.kind == kind and since <= f.at <= until]

    def without_answer_s(self, *, since: float, until: float) -> float:
        """The longest time in which no short request of a load was answered."""
        longest = 0.0
        for load in self.loads:
            times = [since, *(at for at in load.answered_at if since <= at <= until), until]
            longest = max(longest, *(b - a for a, b in itertools.pairwise(times)))
        return longest

    def slow_requests(self) -> list[str]:
        """Short requests that took more than SLOW_S."""
        return [text for text in self.slow() if ": request " in text]

    def slow(self) -> list[str]:
        return [text for load in self.loads for text in load.slow]

    def done(self, kind: str) -> int:
        return sum(load.done[kind] for load in self.loads)

    def unready(self, expert: str) -> float:
        return sum(seconds for (_, name), seconds in self.unready_s.items() if name == expert)

    async def sample_for_ever(self) -> None:
        """Reads the metrics of every router that serves."""
        token = self.deployed.token
        async with session() as client:
            while True:
                for replica in self.deployed.claimed("router-0."):
                    record = self.deployed.record(replica)
                    with contextlib.suppress(Unreachable):
                        if record is not None:
                            text = (await call(client, "GET", f"{record['url']}/metrics", token=token)).body
                            self.unready_s |= {(replica, name): float(s) for name, s in _UNREADY.findall(str(text))}
                await asyncio.sleep(SAMPLE_S)


@contextlib.asynccontextmanager
async def connected(deployed: OnSlurm) -> AsyncIterator[str]:
    """The address of an `hpc-router connect` on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "hpc_router.cli", "connect", "--run", str(deployed.run), "--port", str(port)]
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=null)
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


@contextlib.asynccontextmanager
async def under_load(
    deployed: OnSlurm, *models: str, streams: int = 20, per_s: float = 10, stream_tokens: int = 100
) -> AsyncIterator[Service]:
    async with (
        connected(deployed) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=deployed.token, max_retries=0, timeout=TIMEOUT_S) as plain,
        async_openai_client(deployed.run, max_retries=0, timeout=TIMEOUT_S) as follower,
    ):
        loads = tuple(
            Load(client, models, streams=streams // 2, per_s=per_s / 2, stream_tokens=stream_tokens)
            for client in (follower, plain)
        )
        service = Service(deployed, loads)
        sampling = asyncio.create_task(service.sample_for_ever())
        try:
            async with loads[0].running(), loads[1].running():
                yield service
                service.ended_at = time.monotonic()
        finally:
            sampling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sampling


def events(deployed: OnSlurm, kind: str) -> list[dict[str, Any]]:
    lines = (deployed.run / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["kind"] == kind]
