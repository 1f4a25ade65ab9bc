"""The verb `connect` and its files: real processes, with scripted routers behind them."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from hpc_router.cluster.commands.env import exports
from hpc_router.cluster.commands.tunnel import LocalHost, tunnel_to_forwarder
from hpc_router.connect import listener
from hpc_router.connect.listener import RunningForwarder, _listen_unix, running_forwarder, serving_address
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.net.addresses import free_port
from hpc_router.state.job_records import start_ticks
from hpc_router.state.private_folder import make_private, user_folder
from hpc_router.state.registry import State
from hpc_router.state.run_directory import RunDir, make_run
from tests.client.fakes import FakeRouter, drains, enter, fake_router, record_of
from tests.support.needs import ROOT
from tests.support.processes import ignores
from tests.support.waiting import GUARD_S, eventually

pytestmark = pytest.mark.usefixtures("no_proxy")


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@pytest.fixture
async def router(run: RunDir) -> AsyncIterator[FakeRouter]:
    async with fake_router(run) as made:
        enter(run, record_of(made.url))
        yield made


async def cli(run: RunDir, *words: str) -> tuple[int, str, str]:
    """Runs `hpc-router WORDS --run RUN` to its end. Returns exit status, stdout and stderr."""
    argv = [sys.executable, "-m", "hpc_router.cli", *words, "--run", str(run.path)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    async with asyncio.timeout(GUARD_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def foreground(run: RunDir, *before: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process of `BEFORE hpc-router connect`, and the address that it prints."""
    argv = [*before, sys.executable, "-m", "hpc_router.cli", "connect", "--run", str(run.path)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(GUARD_S):
            yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def detached(run: RunDir) -> AsyncIterator[Callable[..., Awaitable[RunningForwarder]]]:
    """`await detached(*words)` returns the process that `connect --detach` started."""
    pids = set()

    async def start(*words: str) -> RunningForwarder:
        status, out, err = await cli(run, "connect", "--detach", *words)
        assert status == 0, err
        running = running_forwarder(run, tcp="--port" in words)
        assert running is not None
        assert out == f"{running.address}\n"
        assert f"`kill {running.pid}` ends it" in err
        pids.add(running.pid)
        return running

    yield start
    for pid in pids:
        await ended(pid)


async def ended(pid: int, number: int = signal.SIGTERM) -> None:
    if start_ticks(pid) is not None:
        os.kill(pid, number)
    await eventually(lambda: start_ticks(pid) is None)


async def models(address: str, **headers: str) -> int:
    """The status of a request to the socket or to the URL."""
    url = address if address.startswith("http://") else "http://localhost"
    connector = None if url == address else aiohttp.UnixConnector(address)
    async with aiohttp.ClientSession(connector=connector) as session, session.get(f"{url}/x", headers=headers) as got:
        return got.status


async def test_the_owner_uses_a_socket_without_a_token(run: RunDir, router: FakeRouter, detached: Any) -> None:
    """curl needs no token. A second `connect` returns the first one's address. The end leaves no file."""
    running = await detached()
    folder = Path(running.address).parent
    assert Path(running.address).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    curl = ["curl", "-sS", "--fail", "--unix-socket", running.address, "http://localhost/v1/models"]
    assert "choices" in (await asyncio.to_thread(subprocess.check_output, curl, text=True))
    assert (await detached()).pid == running.pid
    status, out, err = await cli(run, "connect")
    assert (status, out) == (1, "")
    assert f"connect already serves {run.path} at {running.address}; `kill {running.pid}` ends that process" in err
    await ended(running.pid)
    assert not Path(running.address).exists()
    assert running_forwarder(run, tcp=False) is None
    assert [path for path in folder.iterdir() if path.stem == Path(running.address).stem] == []
    assert running.log is not None
    assert f"requests go to router-0.g1 at {router.url}" in Path(running.log).read_text()
    assert Path(running.log).stat().st_mode & 0o777 == 0o600


async def test_a_socket_that_a_killed_process_left_is_replaced(run: RunDir, router: FakeRouter, detached: Any) -> None:
    killed = await detached()
    await ended(killed.pid, signal.SIGKILL)
    assert Path(killed.address).exists()
    running = await detached()
    assert running.address == killed.address
    assert await models(running.address) == 200


async def test_a_port_requires_the_token(run: RunDir, router: FakeRouter, detached: Any) -> None:
    port = free_port()
    running = await detached("--port", str(port))
    assert running.address == f"http://127.0.0.1:{port}"
    assert await models(running.address) == 401
    assert await models(running.address, authorization=f"Bearer {run.token()}") == 200
    status, _, err = await cli(run, "connect", "--detach", "--port", str(port + 1))
    assert status == 1
    assert f"connect already serves {run.path} at {running.address}" in err


@pytest.mark.parametrize("words", [(), ("--detach",)])
async def test_a_port_in_use(run: RunDir, words: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        status, out, err = await cli(run, "connect", *words, "--port", str(port))
    assert (status, out) == (2, "")
    assert err == f"hpc-router: --port {port}: Address already in use; choose another port\n"
    assert running_forwarder(run, tcp=True) is None


@pytest.mark.parametrize("words", [("--port", "0"), ("--port", "65536"), ("--hold", "-1"), ("--hold", "x"), ("more",)])
async def test_wrong_arguments(run: RunDir, words: tuple[str, ...]) -> None:
    status, out, err = await cli(run, "connect", *words)
    assert (status, out) == (2, "")
    assert "see `hpc-router" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_ends_it_in_order(run: RunDir, number: signal.Signals) -> None:
    """A request that is held at that time gets no response."""
    async with foreground(run) as (process, address):
        asked = asyncio.create_task(models(address))
        assert process.stderr is not None
        while b"no router leads; requests wait for one" not in await process.stderr.readline():
            pass
        process.send_signal(number)
        assert await process.wait() == 0
        assert b"Traceback" not in await process.stderr.read()
        with pytest.raises(aiohttp.ClientError):
            await asked
    assert not Path(address).exists()
    assert running_forwarder(run, tcp=False) is None


async def test_a_signal_that_the_shell_ignores_does_not_end_it(run: RunDir, router: FakeRouter) -> None:
    """An example is `nohup hpc-router connect &` when the terminal is closed."""
    async with foreground(run, "nohup") as (process, address):
        assert ignores(process.pid, signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert await models(address) == 200
        process.terminate()
        assert await process.wait() == 0


async def test_a_detached_process_that_cannot_start(run: RunDir) -> None:
    """The command that started it prints the reason."""
    folder = user_folder(listener.SCRATCH)
    make_private(folder)
    in_the_way = listener._description(folder, run, tcp=False).with_suffix(".sock")
    in_the_way.mkdir()
    status, out, err = await cli(run, "connect", "--detach")
    in_the_way.rmdir()
    assert (status, out) == (1, "")
    assert f"Is a directory: '{in_the_way}'" in err
    assert running_forwarder(run, tcp=False) is None


async def test_json(run: RunDir, router: FakeRouter) -> None:
    status, out, _ = await cli(run, "connect", "--detach", "--json")
    running = running_forwarder(run, tcp=False)
    assert running is not None
    await ended(running.pid)
    assert status == 0
    assert json.loads(out) == {"address": running.address, "port": None, "pid": running.pid, "log": running.log}


def completions(client: openai.AsyncOpenAI, *, stream: bool) -> Any:
    return client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "?"}], stream=stream)


async def test_an_openai_client_sees_no_handover(run: RunDir, detached: Any) -> None:
    """The client does not retry. Three routers follow each other; each drains when the next one is ready."""
    async with AsyncExitStack() as stack:
        routers = [await stack.enter_async_context(fake_router(run)) for _ in range(3)]
        enter(run, record_of(routers[0].url))
        running = await detached("--port", str(free_port()))
        client = openai.AsyncOpenAI(base_url=f"{running.address}/v1", api_key=run.token(), max_retries=0)
        await stack.enter_async_context(client)
        over, from_ = asyncio.Event(), set()

        async def calls(*, stream: bool) -> int:
            count = 0
            while not over.is_set():
                answer = await completions(client, stream=stream)
                if stream:
                    pieces = [piece.choices[0].delta.content or "" async for piece in answer]
                    from_.add("".join(pieces))
                else:
                    from_.add(answer.choices[0].message.content)
                count += 1
            return count

        callers = [asyncio.create_task(calls(stream=bool(number % 2))) for number in range(8)]
        for generation, router in enumerate(routers, start=1):
            enter(run, record_of(router.url, generation=generation))
            if generation > 1:
                old = routers[generation - 2]
                old.acts.clear()
                old.acts.append(drains)
                enter(run, record_of(old.url, generation=generation - 1, state=State.DRAINING))
            await eventually(partial(from_.__contains__, f"from {router.url}"))
            if generation > 1:
                await old.die()
        over.set()
        counts = await asyncio.gather(*callers)
    assert all(counts)
    assert from_ == {f"from {router.url}" for router in routers}


class TestOtherUsers:
    """What other users of the host can do."""

    @pytest.fixture
    def open_folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))
        folder.chmod(0o755)
        yield folder
        shutil.rmtree(folder)

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
    def test_another_user_cannot_open_the_socket(self, open_folder: Path) -> None:
        """Even if the folder allows it; the owner can."""
        path = open_folder / "s"
        with _listen_unix(path):
            curl = ["curl", "-s", "--max-time", "0.2", "--unix-socket", str(path), "http://localhost/"]
            other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *curl]
            assert subprocess.run(other, check=False).returncode == 7, "no connection"
            assert subprocess.run(curl, check=False).returncode == 28, "connected, and got no response"

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
    def test_a_name_that_another_user_has_taken(
        self, run: RunDir, open_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other user's folder is neither read nor written; the user's runtime folder is used instead, if there is
        one."""
        monkeypatch.setattr(listener, "SCRATCH", open_folder)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        taken = user_folder(open_folder)
        with serving_address(run, port=None):
            assert running_forwarder(run, tcp=False) is not None
            os.chown(taken, 12345, 12345)
            assert running_forwarder(run, tcp=False) is None
            with (
                pytest.raises(LaunchError, match=f"{taken} belongs to another user"),
                serving_address(run, port=None),
            ):
                pass
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_folder))
            with serving_address(run, port=None) as (running, _):
                assert Path(running.address).parent == open_folder / "hpc-router"
                assert running_forwarder(run, tcp=False) == running


class TestEnv:
    def test_the_address_of_a_running_connect(self, run: RunDir) -> None:
        port = free_port()
        with serving_address(run, port=port):
            lines, note = exports(run, {})
        assert lines == [
            f"export OPENAI_BASE_URL=http://127.0.0.1:{port}/v1",
            f"export OPENAI_API_KEY={run.token()}",
        ]
        assert note is None

    def test_it_is_quoted_for_the_shell_and_kept_from_proxies(self, run: RunDir) -> None:
        (run.path / "token").write_text("a'b $(id)\n")
        port = free_port()
        with serving_address(run, port=port):
            lines, _ = exports(run, {"http_proxy": "http://proxy:3128", "no_proxy": ".site,n1"})
        shell = "; ".join([*lines, 'printf "%s|" "$OPENAI_API_KEY" "$no_proxy" "$NO_PROXY"'])
        assert subprocess.check_output(["sh", "-c", shell], text=True) == "a'b $(id)|.site,n1,127.0.0.1|127.0.0.1|"

    async def test_without_a_router_nothing_is_set(self, run: RunDir) -> None:
        status, out, err = await cli(run, "env")
        assert (status, out) == (1, "")
        assert "no router serves" in err


class TestTunnel:
    HERE = LocalHost("ada", "login1.hpc.example", frozenset({"login1", "login1.hpc.example"}))

    @pytest.mark.parametrize(
        ("login", "line"),
        [
            (None, "ssh -N -L 9000:/tmp/x.sock ada@login1.hpc.example"),
            ("login1", "ssh -N -L 9000:/tmp/x.sock login1"),
            # a login name may stand for several hosts, and only this one has the socket
            ("hpc.example", "ssh -N -J hpc.example -L 9000:/tmp/x.sock ada@login1.hpc.example"),
            ("eve@hpc", "ssh -N -J eve@hpc -L 9000:/tmp/x.sock eve@login1.hpc.example"),
        ],
    )
    def test_to_a_socket(self, login: str | None, line: str) -> None:
        running = RunningForwarder("/runs/a", "/tmp/x.sock", None, 1, 1, None)
        assert tunnel_to_forwarder(running, login=login, here=self.HERE, port=9000).line == line

    def test_to_a_port(self) -> None:
        running = RunningForwarder("/runs/a", "http://127.0.0.1:8001", 8001, 1, 1, None)
        made = tunnel_to_forwarder(running, login=None, here=self.HERE, port=8000)
        assert made.line == "ssh -N -L 8000:127.0.0.1:8001 ada@login1.hpc.example"
        assert "ssh ada@login1.hpc.example 'cat /runs/a/token'" in "\n".join(made.notes())

    async def test_the_verb_prefers_a_running_connect(self, run: RunDir) -> None:
        """`connect` is preferred to the router, and a socket to a port. No router has to serve."""
        with serving_address(run, port=None) as (running, _), serving_address(run, port=free_port()):
            status, out, _ = await cli(run, "url", "--ssh", "--port", "9000")
            assert status == 0
            assert f"-L 9000:{running.address} " in out
            status, out, _ = await cli(run, "url", "--ssh", "--json")
            assert json.loads(out)["url"] == running.address
        status, out, _ = await cli(run, "url", "--ssh")
        assert (status, out) == (1, "")


def test_a_socket_in_use_is_not_replaced(run: RunDir) -> None:
    """Even if the file that describes its process was removed."""
    with serving_address(run, port=None) as (running, _):
        Path(running.address).with_suffix(".json").unlink()
        assert running_forwarder(run, tcp=False) is None
        with (
            pytest.raises(LaunchError, match=f"another process serves {running.address}"),
            serving_address(run, port=None),
        ):
            pass


def test_one_process_per_address(run: RunDir) -> None:
    port = free_port()
    with serving_address(run, port=port) as (running, _):
        with (
            pytest.raises(LaunchError, match=f"connect already serves {run.path} at {running.address}"),
            serving_address(run, port=port),
        ):
            pass
        other = make_run(run.path.parent / "other")
        with (
            pytest.raises(ConfigError, match=f"--port {port}: Address already in use"),
            serving_address(other, port=port),
        ):
            pass
    with serving_address(run, port=port):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a network namespace")
def test_a_node_that_is_switched_off_ends_its_requests(tmp_path: Path) -> None:
    """Requests of `hpc_router.client` and of `connect` fail instead of waiting for the client's own timeout."""
    argv = ["unshare", "--net", sys.executable, "-m", "tests.connect.lost_node", str(tmp_path)]
    shown = subprocess.run(argv, cwd=ROOT, timeout=GUARD_S, check=True, capture_output=True, text=True).stdout
    assert sorted(shown.splitlines()) == [
        "async NoRouterConnectionError",
        "connect 503",
        "sync NoRouterConnectionError",
    ]
