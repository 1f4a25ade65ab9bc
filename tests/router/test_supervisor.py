"""The router's processes: each is replaced when it dies, the others serve on, none outlives the supervisor."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpc_router.registry import Kind, Reader, leading_router
from hpc_router.router.supervisor import LONGEST_PAUSE_S, pause_s
from hpc_router.rundir import RunDir, make_run
from tests.needs import ROOT
from tests.processes import with_word
from tests.router.fakes import event, fake_replica, stream
from tests.waiting import eventually


def test_it_is_started_again_at_once_then_after_longer_and_longer_pauses() -> None:
    pauses = [pause_s(times) for times in range(1, 20)]
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S


@dataclass
class Serving:
    run: RunDir
    process: subprocess.Popen[str]
    url: str

    async def get(self, path: str) -> Any:
        return await asyncio.to_thread(self.get_now, path)

    def get_now(self, path: str) -> Any:
        headers = {"authorization": f"Bearer {self.run.token()}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=20) as got:
            raw = got.read()
        return json.loads(raw) if got.headers.get_content_type() == "application/json" else raw.decode()

    async def router(self) -> dict[str, Any]:
        value: dict[str, Any] = (await self.get("/status"))["router"]
        return value

    async def open(self, *, model: str = "math") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream, up to its first event."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.run.token()}\r\n"
        writer.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readuntil(b"\n\n\r\n")
        return reader, writer


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@asynccontextmanager
async def serving(run: RunDir, *overrides: str, workers: int = 2) -> AsyncIterator[Serving]:
    words = [f"run={run.path}", "topology=empty", "router.host=127.0.0.1", "router.reconcile=false"]
    quick = ["policy=model_field", "router.probe_s=0.2", "router.discovery_s=0.1", f"router.workers={workers}"]
    argv = [sys.executable, "-m", "launch.router", *words, *quick, *overrides]
    process = await asyncio.to_thread(partial(subprocess.Popen, argv, cwd=ROOT, stdin=subprocess.DEVNULL))
    try:
        leading = await eventually(lambda: leading_router(Reader(run.registry).snapshot()))
        yield Serving(run, process, leading.url)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)
    assert process.returncode == 0
    assert not with_word(str(run.path))
    assert not [r for r in Reader(run.registry).snapshot().values() if r.kind is Kind.ROUTER]


def pids(router: dict[str, Any]) -> dict[str, int]:
    return {"control": router["control"]["pid"]} | {f"worker {w['worker']}": w["pid"] for w in router["workers"]}


def all_serve(router: dict[str, Any]) -> bool:
    return all(worker["serving"] for worker in router["workers"])


async def settled(one: Serving) -> dict[str, Any]:
    """Once every process is there."""
    while True:
        router = await one.router()
        if all_serve(router):
            return router
        await asyncio.sleep(0.02)


async def test_a_killed_process_is_replaced_and_the_others_serve_on(run: RunDir) -> None:
    """Streams of other workers go on to their end; nobody waits for a control process."""
    async with (
        fake_replica(run, "math-0.g1", stream([event("a")], then="hang"), capacity=64) as fake,
        serving(run) as one,
    ):
        await eventually_ready(one)
        streams = [await one.open() for _ in range(12)]
        before = await one.router()
        assert (before["in_flight"], all_serve(before)) == (12, True)
        on = {w["worker"]: w["in_flight"] for w in before["workers"]}
        assert all(on.values()), "the kernel dealt them out"
        os.kill(before["control"]["pid"], signal.SIGKILL)
        after = await settled(one)
        assert pids(after)["control"] != pids(before)["control"]
        assert (after["in_flight"], after["control"]["restarts"]) == (12, 1)
        assert (await one.get("/status"))["experts"]["math"]["replicas"][0]["state"] == "ready"
        os.kill(pids(before)["worker 0"], signal.SIGKILL)
        reset = [s for s in streams if await is_reset(s)]
        assert len(reset) == on[0]
        after = await settled(one)
        assert (after["in_flight"], after["workers"][0]["restarts"]) == (on[1], 1)
        assert pids(after)["worker 0"] != pids(before)["worker 0"]
        fake.go_on.set()
        for reader, writer in streams:
            if (reader, writer) not in reset:
                assert (await reader.read(10_000)).endswith(b"0\r\n\r\n")
            writer.close()
        await zeros(one)


async def is_reset(stream: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bool:
    """Within the time that the kernel needs to say so."""
    try:
        async with asyncio.timeout(0.5):
            return not await stream[0].read(1)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


async def eventually_ready(one: Serving, expert: str = "math") -> None:
    while True:
        with suppress(urllib.error.HTTPError):  # 503 as long as none is
            if expert in (await one.get("/ready"))["ready"]:
                return
        await asyncio.sleep(0.05)


async def zeros(one: Serving) -> None:
    while True:
        told = await one.get("/status")
        lines = [line for line in (await one.get("/metrics")).splitlines() if "in_flight" in line and line[0] != "#"]
        if told["router"]["in_flight"] == 0 and all(line.endswith(" 0.0") for line in lines):
            return
        await asyncio.sleep(0.05)
