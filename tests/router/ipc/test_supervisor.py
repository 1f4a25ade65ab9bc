"""The router's processes: a dead one is restarted, the others continue to serve, none outlives the supervisor."""

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cluster.commands.set import change, parse_settings
from hpc_router.errors import ConfigError
from hpc_router.router.ipc.supervisor import MAX_PAUSE_S, pause_s
from hpc_router.routing import exemplars
from hpc_router.state.job_records import FailureReason, JobDir, JobPhase
from hpc_router.state.log_file import BURST
from hpc_router.state.registry import RecordKind, RegistryReader, leading_router
from hpc_router.state.run_directory import RunDir, make_run
from tests.router.fakes import FakeReplica, event, fake_replica, stream
from tests.support.needs import ROOT
from tests.support.processes import with_word
from tests.support.waiting import eventually


def test_a_child_restarts_at_once_then_after_growing_pauses() -> None:
    pauses = [pause_s(times) for times in range(1, 20)]
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_PAUSE_S


QUIET_FOR_LONG = """
import mmap, os, signal, struct, time
from pathlib import Path
from hpc_router.router.ipc.messages import AttachCommand, DrainCommand, EndCommand, ProcessesChanged
from hpc_router.router.ipc.shared_counters import Counters
from hpc_router.router.ipc.supervisor import RouterSupervisor
from hpc_router.router.ipc.supervisor_commands import receive_command
from hpc_router.router.main import beside
import socket

AGE = mmap.mmap(-1, 8)  # seconds, seen by all processes
ROUTER = os.getpid()

def clock():
    return time.monotonic() + struct.unpack("d", AGE)[0]

def until(spec, command):
    while (received := receive_command(spec.commands)) is not None and not isinstance(received[0], command):
        if received[1] is not None:
            received[1].close()

def until_it_waits():
    while Path(f"/proc/{ROUTER}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0)

def control(spec):
    until(spec, AttachCommand)  # the worker runs
    until(spec, ProcessesChanged)
    until_it_waits()
    AGE[:] = struct.pack("d", 1e6)
    os.kill(ROUTER, STOP_SIGNAL)
    until(spec, EndCommand)
    print("control ended", flush=True)

def worker(spec):
    until(spec, DrainCommand)
    until_it_waits()  # by then the supervisor has checked whether the time to drain is over
    print("worker drained", flush=True)

with socket.socket() as reserved:
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("127.0.0.1", 0))
    RouterSupervisor(control, worker, lambda: beside(reserved), Counters(workers=1), stop_s=60.0, clock=clock).run()
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGALRM, signal.SIGQUIT]
)
def test_an_idle_router_gives_its_workers_the_whole_time_to_drain(number: signal.Signals) -> None:
    """The time to drain begins with the signal, not with the last thing that happened before it."""
    program = QUIET_FOR_LONG.replace("STOP_SIGNAL", str(number.value))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["worker drained", "control ended"]


@dataclass
class Serving:
    run: RunDir
    process: subprocess.Popen[str]
    url: str

    async def get(self, path: str) -> Any:
        return await asyncio.to_thread(self.get_now, path)

    def get_now(self, path: str) -> Any:
        """Whatever the status."""
        return self._ask("GET", path, None, {})[1]

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        return await asyncio.to_thread(self._ask, "POST", path, json.dumps(body), headers)

    def _ask(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> tuple[int, Any]:
        """Over a connection of its own, so any worker may be the one that answers."""
        with closing(http.client.HTTPConnection(*self.address, timeout=20)) as connection:
            told = {"authorization": f"Bearer {self.run.token()}", **headers}
            connection.request(method, path, body, headers=told)
            with connection.getresponse() as got:
                raw, kind = got.read(), got.getheader("content-type", "")
        return got.status, json.loads(raw) if kind == "application/json" else raw.decode()

    async def router(self) -> dict[str, Any]:
        value: dict[str, Any] = (await self.get("/status"))["router"]
        return value

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def head(self, body: bytes) -> bytes:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.run.token()}\r\n"
        return head.encode() + f"content-length: {len(body)}\r\n\r\n".encode()

    async def open(self, *, model: str = "math") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream, up to its first event."""
        reader, writer = await asyncio.open_connection(*self.address)
        body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
        writer.write(self.head(body) + body)
        await reader.readuntil(b"\n\n\r\n")
        return reader, writer


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


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
        leading = await eventually(lambda: leading_router(RegistryReader(run.registry).snapshot()))
        yield Serving(run, process, leading.url)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)
    assert process.returncode == 0
    assert not with_word(str(run.path))
    assert not [r for r in RegistryReader(run.registry).snapshot().values() if r.kind is RecordKind.ROUTER]


def pids(router: dict[str, Any]) -> dict[str, int]:
    return {"control": router["control"]["pid"]} | {f"worker {w['worker']}": w["pid"] for w in router["workers"]}


def all_serve(router: dict[str, Any]) -> bool:
    return all(worker["serving"] for worker in router["workers"])


async def settled(one: Serving) -> dict[str, Any]:
    """Once every process is there; one that is being killed may still accept a connection, and reset it."""
    while True:
        with suppress(ConnectionError):
            router = await one.router()
            if all_serve(router):
                return router
        await asyncio.sleep(0.02)


async def test_a_killed_process_is_replaced_and_the_others_serve_on(run: RunDir) -> None:
    """Streams of other workers go on to their end; no request waits for the control process."""
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
        after = await killed(one, "control")
        assert pids(after)["control"] != pids(before)["control"]
        assert (after["in_flight"], after["control"]["restarts"]) == (12, 1)
        assert (await one.get("/status"))["experts"]["math"]["replicas"][0]["state"] == "ready"
        after = await killed(one, "worker 0")
        assert (after["in_flight"], after["workers"][0]["restarts"]) == (on[1], 1)
        assert pids(after)["worker 0"] != pids(before)["worker 0"]
        assert await end(streams, fake) == on[0]
        await zeros(one)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
async def test_a_router_that_ends_in_order_leaves_its_port_to_the_next_one(run: RunDir, number: signal.Signals) -> None:
    """Clients that know only the address find the next one there."""
    async with serving(run) as one:
        await settled(one)
        one.process.send_signal(number)
        await asyncio.to_thread(one.process.wait, 30)
    async with serving(run) as two:
        assert two.url == one.url


@pytest.mark.parametrize("killed_too", [False, True])
async def test_a_router_says_how_many_answers_its_end_cut(run: RunDir, killed_too: bool) -> None:
    """Those that its workers gave up after `router.drain_s`, and those of a worker that died meanwhile."""
    limit = "router.drain_s=2" if killed_too else "router.drain_s=0.1"
    acts = stream([event("a")], then="hang")
    async with fake_replica(run, "math-0.g1", acts, capacity=64), serving(run, limit) as one:
        await eventually_ready(one)
        streams = [await one.open() for _ in range(8)]
        router = await one.router()
        job = JobDir(run, router["replica"])
        one.process.terminate()
        if killed_too:
            await eventually(lambda: (at := job.progress()) is not None and at.phase is JobPhase.DRAINING)
            os.kill(pids(router)["worker 0"], signal.SIGKILL)
        for reader, writer in streams:
            with suppress(ConnectionError):
                await reader.read()
            await closed(writer)
    end = job.exit()
    assert end is not None
    assert (end.ok, end.reason, end.cut) == (True, FailureReason.DRAINED, 8)
    assert end.message == "stopped; 8 answers were cut off"


async def end(streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]], fake: FakeReplica) -> int:
    """How many of them were reset; the others come to their proper end."""
    resets = await asyncio.gather(*(is_reset(reader) for reader, _ in streams))
    fake.go_on.set()
    for (reader, writer), reset in zip(streams, resets, strict=True):
        if not reset:
            await reader.readuntil(b"0\r\n\r\n")
        await closed(writer)
    return sum(resets)


async def is_reset(reader: asyncio.StreamReader) -> bool:
    """Within the time that the kernel needs to say so."""
    try:
        async with asyncio.timeout(0.5):
            return not await reader.read(1)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


async def eventually_ready(one: Serving, expert: str = "math") -> None:
    while True:
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


async def test_settings_are_taken_over_without_an_end_to_a_stream(run: RunDir) -> None:
    """In every worker, by the file that changed or by SIGHUP; a worker that comes later has them as well."""
    acts = stream([event("a")], then="hang")
    async with fake_replica(run, "math-0.g1", acts, capacity=64) as fake, serving(run) as one:
        await eventually_ready(one)
        streams = [await one.open() for _ in range(8)]
        on = {w["worker"]: w["in_flight"] for w in (await one.router())["workers"]}
        await set_(run, "policy.fallback=math")
        one.process.send_signal(signal.SIGHUP)
        while await fallbacks(one) != {"math"}:
            await asyncio.sleep(0.05)
        await killed(one, "worker 0")
        while await fallbacks(one) != {"math"}:
            await asyncio.sleep(0.05)
        await set_(run, "policy.fallback=")
        while await fallbacks(one) != {None}:
            await asyncio.sleep(0.05)
        assert await end(streams, fake) == on[0], "of the killed worker alone"
        await zeros(one)


async def set_(run: RunDir, word: str) -> None:
    await asyncio.to_thread(lambda: change(run, *parse_settings([word])))


async def fallbacks(one: Serving) -> set[str | None]:
    """As answered over enough connections that every worker has some of them."""
    told = [await one.post("/route", {"prompt": "x"}) for _ in range(10)]
    return {answer.get("expert") for _, answer in told}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("router.port=8000", "`hpc-router apply router.port=VALUE`"),
        ("router.max_in_flight=many", "'router.max_in_flight'"),
        ("router.max_in_flight=0", "router.max_in_flight"),
        ("router.max_in_fligth=5", "did you mean 'router.max_in_flight'"),
        ("policy.kind=nope", "valid: classifier"),
        ("experts.math.replicas=2", "`hpc-router scale math=N` changes the number of replicas"),
        ("nonsense", "KEY=VALUE"),
    ],
)
def test_invalid_settings_are_refused(run: RunDir, word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        change(run, *parse_settings([word]))
    assert run.read_desired() == {}


async def test_sessions_and_counts_outlive_the_processes_that_kept_them(run: RunDir) -> None:
    """Any worker knows where a session's last turn was answered, and what all have counted."""
    said = {"x-session-id": "s1"}
    async with (
        fake_replica(run, "math-0.g1"),
        fake_replica(run, "math-1.g1"),
        serving(run) as one,
    ):
        await eventually_ready(one)
        assert (await one.post("/v1/responses", {"model": "math", "input": "hi"}, **said))[0] == 200
        turns, victims = 1, ["control", "worker 0", "worker 1", "control", "worker 1", "worker 0"]
        for victim in [None, *victims]:
            if victim is not None:
                await told(one, turns)
                await killed(one, victim)
            for _ in range(4):
                body = {"model": "math", "input": "more", "previous_response_id": "r"}
                status, answer = await one.post("/v1/responses", body, **said)
                assert status == 200, (victim, answer)
                turns += 1
        assert await counted(one) == turns
        await zeros(one)


async def counted(one: Serving) -> float:
    lines = (await one.get("/metrics")).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("hpc_router_requests_total{"))


async def told(one: Serving, turns: int) -> None:
    """Workers say once a second what they have counted, and when they are asked."""
    while await counted(one) != turns:
        await asyncio.sleep(0.05)


async def killed(one: Serving, victim: str) -> dict[str, Any]:
    """-> what the router says of itself once another has taken its place."""
    pid = pids(await settled(one))[victim]
    os.kill(pid, signal.SIGKILL)
    while True:
        router = await settled(one)
        if pids(router)[victim] not in (None, pid):
            return router
        await asyncio.sleep(0.02)


async def test_a_retrained_artefact_is_loaded(run: RunDir) -> None:
    """Every worker decides by it, and says so."""
    prompts = {
        "code": ["def f(x): return x", "sort a python list"],
        "math": ["solve x + 1 = 2", "what is 3 times 4"],
    }
    first = train(run, prompts)
    overrides = ["policy=classifier"]
    async with (
        fake_replica(run, "math-0.g1"),
        fake_replica(run, "code-0.g1"),
        serving(run, *overrides) as one,
    ):
        await eventually_ready(one)
        assert (await one.get("/status"))["policy"]["artefact"] == first
        second = train(run, {"math": prompts["code"], "code": prompts["math"]})
        assert second != first
        while (await one.get("/status"))["policy"]["artefact"] != second:
            await asyncio.sleep(0.05)
        while {(await one.post("/route", {"prompt": "solve x + 1 = 2"}))[1]["expert"] for _ in range(8)} != {"code"}:
            await asyncio.sleep(0.05)


def train(run: RunDir, prompts: dict[str, list[str]]) -> str | None:
    """-> its version."""
    artefact = exemplars.train(prompts)
    artefact.write(run.classifier)
    return artefact.version


async def test_a_flood_of_refused_requests_is_counted_and_hardly_logged(run: RunDir) -> None:
    """Without a token, with a wrong one, and with the right one on a path that does not exist."""
    count = 1000
    async with serving(run, workers=1) as one:
        reader, writer = await asyncio.open_connection(*one.address)
        heads = [
            "GET /v1/models HTTP/1.1\r\nhost: x\r\n",
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-api-key: {'x' * 64}\r\ncontent-length: 0\r\n",
            f"GET /nowhere HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {run.token()}\r\n",
        ]
        for head in heads:
            for _ in range(count):
                writer.write(head.encode() + b"\r\n")
                answer = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", answer)
                assert length is not None
                await reader.readexactly(int(length[1]))
        await closed(writer)
        metrics = await one.get("/metrics")
    assert f'requests_total{{expert="",reason="",status="401"}} {2 * count}.0' in metrics
    assert f'requests_total{{expert="",reason="",status="404"}} {count}.0' in metrics
    logs = {path.name: path.read_text() for path in run.logs.iterdir()}
    assert sorted(logs) == ["router-0.g1.log", "router-0.g1.worker0.log"], "one writer each"
    assert BURST <= logs["router-0.g1.worker0.log"].count(" refused with ") < 2 * BURST
