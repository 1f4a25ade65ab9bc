"""The steps of the supervisor, with real processes and without real pauses."""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hpc_router.config.schema import EngineConfig, ExpertConfig
from hpc_router.expert.agent import engine_supervisor as supervisor_module
from hpc_router.expert.agent.engine_relay import ENGINE_LIMITS
from hpc_router.expert.agent.engine_supervisor import EngineSupervisor, LoadedEngine
from hpc_router.expert.agent.restart_policy import RestartPolicy
from hpc_router.expert.engine_process.process import Command, EngineProcess
from hpc_router.expert.engines import EngineFailure, Place, build_engine, engine_environment
from hpc_router.expert.multinode.start_strategy import SingleNode
from hpc_router.net.protocol import METRICS
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.state import log_file
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_records import FailureReason, JobPhase
from tests.expert.replicas import exists
from tests.support.waiting import GUARD_S, eventually


@dataclass
class Steps:
    seen: list[tuple[JobPhase, FailureReason | None]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    engine_pid: int | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def phase_changed(
        self, phase: JobPhase, *, failure: EngineFailure | None = None, engine_pid: int | None = None
    ) -> None:
        self.seen.append((phase, failure.reason if failure else None))
        self.engine_pid = engine_pid
        if phase is JobPhase.READY:
            self.ready.set()

    async def sleep(self, delay_s: float) -> None:
        self.pauses.append(delay_s)


@asynccontextmanager
async def supervised(
    folder: Path, *, max_restarts: int = 3, **options: Any
) -> AsyncIterator[tuple[EngineSupervisor, Steps]]:
    config = ExpertConfig(model="m", engine=EngineConfig(kind="sim", options=options))
    engine, place, steps, files = build_engine("math", config), Place(folder), Steps(), FileThread("t")
    environment = engine_environment(engine, config, place, inherited={})
    place.temporary.mkdir()
    async with UpstreamClient(ENGINE_LIMITS, socket_path=str(place.socket)) as client:
        yield (
            EngineSupervisor(
                engine=engine,
                strategy=SingleNode(lambda: Command(engine.argv(place), environment, place, folder / "log")),
                client=client,
                files=files,
                observer=steps,
                restarts=RestartPolicy(max_restarts),
                startup_timeout_s=GUARD_S,
                sleep=steps.sleep,
                chance=lambda: 0.0,
            ),
            steps,
        )
    files.close(timeout_s=5)


async def test_two_failed_starts_then_ready_then_cancelled(socket_folder: Path) -> None:
    fault = {"kind": "load_fail", "reason": "cuda", "times": 2, "counter": str(socket_folder / "count")}
    async with supervised(socket_folder, faults=[fault]) as (supervisor, steps):
        (socket_folder / "engine.sock").touch()  # a killed engine leaves its socket behind
        task = asyncio.create_task(supervisor.run())
        await asyncio.wait_for(steps.ready.wait(), GUARD_S)
        assert steps.pauses == [1.0, 2.0]
        failed = [(JobPhase.LOADING, None), (JobPhase.RESTARTING, FailureReason.CUDA)]
        assert steps.seen == [*failed, *failed, (JobPhase.LOADING, None), (JobPhase.READY, None)]
        engine = steps.engine_pid
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine is not None
        assert not exists(engine)


async def test_answers_are_broken_off_while_the_engine_still_runs(socket_folder: Path) -> None:
    """Responses are broken off before the engine is stopped, because the engine could then end them regularly."""
    async with supervised(socket_folder) as (supervisor, steps):
        alive: list[bool] = []

        def break_off() -> None:
            assert steps.engine_pid is not None
            status = Path(f"/proc/{steps.engine_pid}/stat").read_text()
            alive.append(status.rpartition(")")[2].split()[0] in "RS")

        supervisor.break_off = break_off
        task = asyncio.create_task(supervisor.run())
        await asyncio.wait_for(steps.ready.wait(), GUARD_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert alive == [True]


async def test_the_last_of_too_many_failures_is_returned(socket_folder: Path) -> None:
    async with supervised(socket_folder, max_restarts=1, faults=[{"kind": "load_fail", "reason": "kv_cache"}]) as (
        supervisor,
        steps,
    ):
        failure = await asyncio.wait_for(supervisor.run(), GUARD_S)
        assert failure.reason is FailureReason.OUT_OF_MEMORY
        assert steps.pauses == [1.0]


@pytest.mark.parametrize(("lists_models", "length"), [(True, 512), (False, None)])
async def test_what_the_engine_says_of_itself_is_reported_before_it_is_ready(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch, lists_models: bool, length: int | None
) -> None:
    """With the time that it took to load, by the supervisor's clock."""
    loaded: list[tuple[LoadedEngine, bool]] = []
    ticks = itertools.count(100.0, 2.5)
    async with supervised(socket_folder, extra={"max_model_len": 512}) as (supervisor, steps):
        monkeypatch.setattr(type(supervisor.engine), "lists_models", lists_models)
        supervisor.clock = lambda: next(ticks)
        supervisor.on_loaded = lambda engine: loaded.append((engine, steps.ready.is_set()))
        task = asyncio.create_task(supervisor.run())
        await asyncio.wait_for(steps.ready.wait(), GUARD_S)
        assert loaded == [(LoadedEngine(2.5, length, prefix_caching=lists_models or None), False)]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(("value", "expected"), [("True", True), ("False", False), ("None", None)])
async def test_prefix_caching_is_what_the_metrics_of_vllm_say(
    socket_folder: Path, value: str, expected: bool | None
) -> None:
    labels = f'block_size="16",enable_prefix_caching="{value}",engine="0",num_gpu_blocks="512"'

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=f"# HELP x\nvllm:other 1.0\nvllm:cache_config_info{{{labels}}} 1.0\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics)])
    runner = web.AppRunner(app)
    async with supervised(socket_folder) as (supervisor, _):
        await runner.setup()
        await web.UnixSite(runner, str(socket_folder / "engine.sock")).start()
        await supervisor._ask()
        assert supervisor._loaded(2.0).prefix_caching is expected
        await runner.cleanup()


@pytest.mark.usefixtures("quick_watch")
async def test_an_engine_too_busy_to_tell_of_itself_is_asked_again(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: asyncio.Queue[LoadedEngine] = asyncio.Queue()
    busy = True

    async def read(_: EngineSupervisor, path: str, *, limit: int) -> bytes:
        if busy:
            raise TimeoutError
        if path == METRICS:
            return b'vllm:cache_config_info{enable_prefix_caching="True"} 1.0\n'
        return b'{"data": [{"id": "m", "max_model_len": 512}]}'

    async with supervised(socket_folder) as (supervisor, steps):
        monkeypatch.setattr(EngineSupervisor, "_read", read)
        supervisor.on_loaded = loaded.put_nowait
        task = asyncio.create_task(supervisor.run())
        await asyncio.wait_for(steps.ready.wait(), GUARD_S)
        first = loaded.get_nowait()
        assert (first.max_model_len, first.prefix_caching) == (None, None)
        busy = False
        told = await asyncio.wait_for(loaded.get(), GUARD_S)
        assert told == LoadedEngine(first.load_s, max_model_len=512, prefix_caching=True)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_without_one_of_its_adapters_is_never_ready(socket_folder: Path) -> None:
    """Although the engine may start, the record must not list that expert."""
    async with supervised(socket_folder) as (supervisor, steps):
        config = ExpertConfig(model="m", engine=EngineConfig(kind="sim"))
        supervisor.engine = build_engine("math", config, adapters={"law": "/adapters/law"})
        failure = await asyncio.wait_for(supervisor.run(), GUARD_S)
        assert failure == EngineFailure(FailureReason.WEIGHTS, "the engine has not loaded law")
        assert steps.seen == [(JobPhase.LOADING, None)]


async def test_a_flag_the_engine_refuses_is_not_tried_again(socket_folder: Path) -> None:
    async with supervised(socket_folder, extra={"bogus": True}) as (supervisor, steps):
        failure = await asyncio.wait_for(supervisor.run(), GUARD_S)
        assert failure.reason is FailureReason.BAD_OPTION
        assert failure.message.endswith("error: unrecognized arguments: --bogus")
        assert steps.pauses == []


class SlowToEnd(SingleNode):
    """Advances the clock by an hour between an engine's failure and the next decision, as with a lost rank."""

    now = 0.0

    async def over(self, own: EngineFailure) -> EngineFailure:
        self.now += 3600.0
        return own


async def test_the_time_that_an_engine_takes_to_end_is_not_time_in_service(socket_folder: Path) -> None:
    """Otherwise an engine that always fails at once would seem to have served, and be started again for ever."""
    async with supervised(socket_folder, max_restarts=1) as (supervisor, steps):
        assert isinstance(supervisor.strategy, SingleNode)
        slow = SlowToEnd(supervisor.strategy.command)
        supervisor.strategy, supervisor.clock = slow, lambda: slow.now
        task = asyncio.create_task(supervisor.run())
        for _ in range(2):
            await asyncio.wait_for(steps.ready.wait(), GUARD_S)
            steps.ready.clear()
            assert steps.engine_pid is not None
            os.kill(steps.engine_pid, signal.SIGKILL)
        failure = await asyncio.wait_for(task, GUARD_S)
        assert (failure.reason, steps.pauses) == (FailureReason.KILLED, [1.0])


def _with_short_grace(supervisor: EngineSupervisor) -> None:
    assert isinstance(supervisor.strategy, SingleNode)
    patient = supervisor.strategy.command()
    supervisor.strategy.command = lambda: replace(patient, grace_s=0.1)


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "WATCH_S", 0.01)
    monkeypatch.setattr(supervisor_module, "WATCH_TIMEOUT_S", 0.2)


@pytest.mark.usefixtures("quick_watch")
async def test_an_engine_that_stops_answering_is_started_again(socket_folder: Path) -> None:
    """Its process lives, so waiting for its end would not help."""
    async with supervised(socket_folder) as (supervisor, steps):
        _with_short_grace(supervisor)
        task = asyncio.create_task(supervisor.run())
        await asyncio.wait_for(steps.ready.wait(), GUARD_S)
        steps.ready.clear()
        engine = steps.engine_pid
        assert engine is not None
        os.kill(engine, signal.SIGSTOP)
        await asyncio.wait_for(steps.ready.wait(), GUARD_S)
        assert (JobPhase.RESTARTING, FailureReason.TIMEOUT) in steps.seen
        assert not exists(engine)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("quick_watch")
async def test_an_engine_whose_answers_make_progress_does_not_hang(socket_folder: Path) -> None:
    """A long prefill may keep an engine on a CPU from answering a probe."""
    asked, busy = itertools.count(), asyncio.Event()

    def progress() -> int:
        number = next(asked)
        if number > 3 * supervisor_module.HUNG_MISSES:
            busy.set()
        return number

    async with supervised(socket_folder) as (supervisor, steps):
        _with_short_grace(supervisor)
        supervisor.progress = progress
        task = asyncio.create_task(supervisor.run())
        await asyncio.wait_for(steps.ready.wait(), GUARD_S)
        assert steps.engine_pid is not None
        os.kill(steps.engine_pid, signal.SIGSTOP)
        await asyncio.wait_for(busy.wait(), GUARD_S)
        assert steps.seen[-1] == (JobPhase.READY, None)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_that_dropped_a_request_is_probed_at_once(socket_folder: Path) -> None:
    """The probe comes long before the next regular one. A process that lives and answers is not started again."""
    async with supervised(socket_folder) as (supervisor, steps):
        task = asyncio.create_task(supervisor.run())
        await asyncio.wait_for(steps.ready.wait(), GUARD_S)
        supervisor.engine_lost.set()
        async with asyncio.timeout(supervisor_module.WATCH_S):
            await eventually(lambda: not supervisor.engine_lost.is_set())
        assert steps.seen == [(JobPhase.LOADING, None), (JobPhase.READY, None)]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_log_of_an_engine_with_much_output_stays_small(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason of its end is found in its last output, even if the log file was rotated."""
    monkeypatch.setattr(log_file.LogFile.__init__, "__kwdefaults__", {"limit": 50_000})
    config = ExpertConfig(model="m", engine=EngineConfig(kind="sim"))
    files = FileThread("t")
    place, log_path = Place(socket_folder), socket_folder / "log"
    program = (
        "for n in range(20_000): print('line', n, flush=True)\nraise SystemExit('RuntimeError: CUDA error: no device')"
    )
    command = Command([sys.executable, "-c", program], dict(os.environ), place, log_path)
    async with await EngineProcess.start(command, files) as process:
        failure = await asyncio.wait_for(process.failure(build_engine("math", config).signs), GUARD_S)
    await files.run(lambda: None)
    files.close(timeout_s=5)
    assert failure.message == "RuntimeError: CUDA error: no device"
    sizes = [path.stat().st_size for path in (log_path, log_file.rotated_path(log_path))]
    assert all(0 < size < 50_000 + 2 * 2**16 for size in sizes)
    assert log_path.read_text().endswith("RuntimeError: CUDA error: no device\n")
