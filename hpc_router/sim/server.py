"""The life cycle of the engine: load, listen, serve, stop. In-process, the engine is an async context manager.

Connections are accepted by a protocol factory of this module, so that a fault can reset one before a byte is read.
Stopping closes the listener first, and lets running requests finish for `drain_s`. With a `drain_s` of 0, vLLM's
default, running responses end regularly and at once, with the finish reason `abort`. Remaining connections are aborted.
In-process, `die` closes the listener and aborts every connection, which looks to clients as if the process was killed.
"""

import asyncio
import random
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from hpc_router.errors import ConfigError, LaunchError
from hpc_router.sim.admission import AdmissionQueue
from hpc_router.sim.batch_loop import BatchLoop
from hpc_router.sim.config import SimConfig, kv_blocks
from hpc_router.sim.context import EngineContext
from hpc_router.sim.fault_injection import Crash, ResetOnAccept
from hpc_router.sim.fault_schedule import FaultSchedule
from hpc_router.sim.http_api import make_app
from hpc_router.sim.kv_cache import BlockPool
from hpc_router.sim.latency import Clock, LatencyModel, RealClock, fixed_latency
from hpc_router.sim.metrics import RequestCounts
from hpc_router.sim.request_log import RequestLog
from hpc_router.sim.roofline import RooflineEngine

# sun_path holds 108 bytes with the final zero.
MAX_SOCKET_PATH_BYTES = 107
_ABORT_S = 1.0
"""Time in seconds in which clients can receive the ends of aborted responses."""


class SimServer:
    """A simulated engine in this process."""

    def __init__(
        self,
        config: SimConfig | None = None,
        *,
        uds: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Clock | None = None,
        latency: LatencyModel | None = None,
        crash: Crash | None = None,
    ) -> None:
        self.config = config = config or SimConfig()
        if uds is not None and len(str(uds).encode()) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(f"uds: {uds} is longer than {MAX_SOCKET_PATH_BYTES} bytes, the limit of a socket's path")
        self.uds = uds
        self.died = asyncio.Event()
        self._host, self._port = host, port
        clock = clock or RealClock()
        roofline = None if config.roofline is None else RooflineEngine(config.roofline)
        pool = BlockPool(kv_blocks(config, roofline), config.block_size, config.enable_prefix_caching)
        self._context = EngineContext(
            config=config,
            clock=clock,
            latency=latency or fixed_latency(config),
            crash=crash or self._crash,
            admission=AdmissionQueue(capacity=config.capacity, by_priority=config.scheduling_policy == "priority"),
            faults=FaultSchedule(config.faults, seed=config.seed),
            ids=random.Random(),  # not seeded, because replicas with the same seed must not share ids
            pool=pool,
            batch=None
            if roofline is None
            else BatchLoop(roofline, clock, pool, by_priority=config.scheduling_policy == "priority"),
        )
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._loading: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        counts = self.counts
        return f"<SimServer {self.config.model} {self.address}: {counts.running} running, {counts.waiting} waiting>"

    @property
    def address(self) -> str:
        """Returns the address at which the server listens, or will listen: `http://HOST:PORT` or `unix:PATH`."""
        if self.uds is not None:
            return f"unix:{self.uds}"
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"

    @property
    def url(self) -> str:
        """Returns the base URL for clients. For a unix socket, its host is only a placeholder."""
        return "http://localhost" if self.uds is not None else self.address

    @property
    def counts(self) -> RequestCounts:
        return self._context.admission.counts

    @property
    def faults(self) -> FaultSchedule:
        return self._context.faults

    @property
    def recent(self) -> RequestLog:
        return self._context.requests

    async def idle(self) -> None:
        """Waits until no request is running or waiting."""
        await self._context.admission.idle()

    def abort(self) -> None:
        """Aborts every connection. Running requests count as aborted."""
        if self._runner is None or self._runner.server is None:
            return
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def __aenter__(self) -> Self:
        config = self.config
        if not config.listen_while_loading:
            await self._load()
        # Request bodies are not decompressed, so the request log has the bytes that were sent.
        self._runner = web.AppRunner(
            make_app(self._context),
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=config.keepalive_s,
            max_line_size=65_536,
            max_field_size=65_536,
            shutdown_timeout=1.0,
        )
        await self._runner.setup()
        try:
            self._listener = await self._listen()
        except OSError as exc:
            await self._runner.cleanup()
            raise LaunchError(f"cannot listen on {self.address}: {exc.strerror or exc}") from exc
        if config.listen_while_loading:
            self._loading = asyncio.create_task(self._load())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stops the server as SIGTERM does. Further calls have no effect."""
        assert self._runner is not None
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])
        self._close_listener()
        await self._drain(self._runner)
        await self._runner.cleanup()
        if self._context.batch is not None:
            await self._context.batch.close()
        if self.uds is not None:
            self.uds.unlink(missing_ok=True)

    async def _load(self) -> None:
        if self.config.load_s:
            await self._context.clock.sleep(self.config.load_s)
        self._context.loaded = True

    async def _listen(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        if self.uds is not None:
            return await loop.create_unix_server(self._accept, str(self.uds), backlog=1024)
        listener = await loop.create_server(self._accept, self._host, self._port, backlog=1024)
        self._port = listener.sockets[0].getsockname()[1]
        return listener

    def _accept(self) -> asyncio.BaseProtocol:
        if self._context.faults.at_connect():
            self.counts.faults["reset"] += 1
            return ResetOnAccept()
        assert self._runner is not None
        assert self._runner.server is not None
        return self._runner.server()

    async def _drain(self, runner: web.AppRunner) -> None:
        if runner.server is not None:
            runner.server.pre_shutdown()
        admission, drain_s = self._context.admission, self.config.drain_s
        if drain_s:
            admission.refuse()
        else:
            admission.stop()
        try:
            async with asyncio.timeout(drain_s or _ABORT_S):
                await self.idle()
        except TimeoutError:
            self.abort()

    def _crash(self, exit_code: int | None) -> None:
        self.died.set()
        self._close_listener()
        self.abort()

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
