"""Users of a real router with two workers: their tokens and limits, another Unix user, and HTTPS."""

import asyncio
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import anthropic
import openai
import psutil
import pytest

from hpc_router.client import openai_client
from hpc_router.net.addresses import free_port
from hpc_router.router.access.window_count import window_at
from hpc_router.state.registry import Record, RegistryReader, leading_router
from hpc_router.state.run_directory import RunDir, open_run
from tests.e2e.deployment import cli
from tests.e2e.support import engine, running, until_known
from tests.support.certificates import make_certificate
from tests.support.waiting import eventually, eventually_sync

pytestmark = pytest.mark.e2e

TURNS: Any = [{"role": "user", "content": "hi"}]
QUICK = ("router.discovery_s=0.1", "router.probe_s=0.5", "router.reconcile=false", "router.workers=2")


def leader(run: RunDir) -> Record | None:
    return leading_router(RegistryReader(run.registry).snapshot())


@contextmanager
def served(folder: Path, *overrides: str) -> Iterator[tuple[RunDir, Record]]:
    """A router with two workers and the experts `math` and `law`, which one simulated engine serves."""
    path = folder / "run"
    with engine("m", options=["--ttft-ms", "1", "--itl-ms", "1"]) as url:
        for expert in ("math", "law"):
            cli("register", "--run", str(path), "--expert", expert, "--url", f"{url}/v1")
        run = open_run(path)
        with running("-m", "launch.router", f"run={path}", *QUICK, *overrides):
            record = eventually_sync(lambda: leader(run))
            eventually_sync(lambda: cli("chat", "--run", str(path), "--model", "law", "x", check=False).returncode == 0)
            yield run, record


def create(run: RunDir, *words: str) -> str:
    return cli("token", "create", "--run", str(run.path), "--user", "alice", *words).stdout.strip()


def trusting(record: Record) -> ssl.SSLContext | bool:
    return True if record.certificate is None else ssl.create_default_context(cadata=record.certificate)


async def status_of(record: Record, token: str) -> int:
    """The status of a request on a connection of its own, so that any worker may get it."""
    client = openai.DefaultAsyncHttpxClient(verify=trusting(record), trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=f"{record.url}/v1", api_key=token, max_retries=0, http_client=client
    ) as client_of_user:
        try:
            await client_of_user.chat.completions.create(model="math", messages=TURNS, max_tokens=2)
        except openai.APIStatusError as error:
            return error.status_code
    return 200


async def statuses(record: Record, token: str, count: int) -> Counter[int]:
    return Counter(await asyncio.gather(*(status_of(record, token) for _ in range(count))))


def test_one_budget_for_all_workers(tmp_path: Path) -> None:
    """Of many requests at once, on connections that the kernel spreads over two workers, at most as many are served as
    the token allows. A token that is revoked opens none of them."""
    with served(tmp_path) as (run, record):
        token = create(run, "--limit", "requests=12")
        owner = run.token()
        until_known(record.url, token, certificate=record.certificate)
        began_at = time.monotonic()
        seen = asyncio.run(statuses(record, token, 30))
        minutes = window_at(time.monotonic()) - window_at(began_at) + 1
        assert set(seen) <= {200, 429}
        assert seen[200] <= 12 * minutes
        assert seen[429] or minutes > 2
        assert asyncio.run(statuses(record, owner, 30)) == {200: 30}
        cli("token", "revoke", "--run", str(run.path), "--user", "alice")

        async def all_refused() -> bool:
            return set(await statuses(record, token, 10)) == {401}

        asyncio.run(eventually(all_refused))
        assert asyncio.run(statuses(record, owner, 10)) == {200: 10}


def repeat(call: Callable[[], object]) -> NoReturn:
    """Calls until a call raises: the first one may begin a new minute, for which nothing is counted yet."""
    while True:
        call()


def test_the_official_clients(tmp_path: Path) -> None:
    with served(tmp_path) as (run, record):
        token = create(run, "--limit", "tokens=50", "--experts", "math")
        until_known(record.url, token, certificate=record.certificate)
        with openai.OpenAI(base_url=f"{record.url}/v1", api_key=token, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["auto", "math"]
            chunks = list(client.chat.completions.create(model="math", messages=TURNS, max_tokens=30, stream=True))
            assert chunks[-1].choices[0].finish_reason
            with pytest.raises(openai.RateLimitError) as limited:
                repeat(lambda: client.chat.completions.create(model="math", messages=TURNS, max_tokens=49))
            assert limited.value.param == "tokens"
            assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
            with pytest.raises(openai.PermissionDeniedError):
                client.chat.completions.create(model="law", messages=TURNS)
        with anthropic.Anthropic(base_url=record.url, api_key=token, max_retries=0) as claude:
            with pytest.raises(anthropic.RateLimitError, match="generated tokens per minute"):
                repeat(lambda: claude.messages.create(model="math", messages=TURNS, max_tokens=49))
            with pytest.raises(anthropic.PermissionDeniedError, match="may not use the expert 'law'"):
                claude.messages.create(model="law", messages=TURNS, max_tokens=4)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_what_another_unix_user_sees(tmp_path: Path) -> None:
    """No file of the run, and no token among the processes; without a token, no answer of the API either."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    with served(tmp_path) as (run, record):
        token = create(run)
        until_known(record.url, token, certificate=record.certificate)
        other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

        def as_other(argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
            return subprocess.run([*other, *argv], capture_output=True, text=True, check=False)

        for name in ("", "tokens.json", "token", "secret", "registry.json"):
            assert "Permission denied" in as_other(["ls", "-l", str(run.path / name)]).stderr
        listed = as_other(["ps", "-eo", "args", "-ww"])
        assert "launch.router" in listed.stdout or "hpc_router" in listed.stdout
        for secret in (token, token.rpartition("-")[2], run.token()):
            assert secret not in listed.stdout
            for process in psutil.process_iter():
                if process.pid != os.getpid() and str(run.path) in " ".join(_arguments(process)):
                    assert secret not in " ".join(_arguments(process))
        ask = [sys.executable, "-I", "-c", "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).status)"]
        if as_other([sys.executable, "-I", "-c", ""]).returncode == 0:  # the interpreter is readable for everybody
            assert as_other([*ask, f"{record.url}/ready"]).stdout == "200\n"
            assert "401" in as_other([*ask, f"{record.url}/v1/models"]).stderr
        logs = [path.read_text(errors="replace") for path in run.path.rglob("*.log")]
        assert logs
        assert not any(token.rpartition("-")[2] in log for log in logs)


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_https(tmp_path: Path) -> None:
    """The verbs, our client, `connect` and a plain client that trusts the certificate; then it is renewed."""
    cert, key = make_certificate(tmp_path)
    with served(tmp_path, f"router.tls_cert={cert}", f"router.tls_key={key}") as (run, record):
        path = str(run.path)
        assert record.url.startswith("https://")
        assert record.certificate == cert.read_text()
        assert cli("url", "--run", path).stdout.strip() == record.url
        assert '"answers": true' in cli("status", "--run", path, "--json").stdout
        assert cli("route", "--run", path, "x", check=False).returncode == 0
        assert "SSL_CERT_FILE" in cli("env", "--run", path).stderr
        assert asyncio.run(status_of(record, run.token())) == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"{record.url}/health")

        def answered() -> str:
            with openai_client(run.path, max_retries=0) as client:
                made = client.chat.completions.create(model="math", messages=TURNS, max_tokens=2)
                return made.choices[0].finish_reason

        assert answered() == "length"
        with running("-m", "hpc_router.cli", "connect", "--run", path, "--port", str(free_port())):
            environment = eventually_sync(lambda: _connect_lines(path))
            with openai.OpenAI(base_url=environment, api_key=run.token(), max_retries=0) as plain:
                assert plain.chat.completions.create(model="math", messages=TURNS, max_tokens=2).choices
                make_certificate(tmp_path)
                renewed = eventually_sync(lambda: _renewed(run, record))
                assert renewed.url == record.url
                asyncio.run(eventually(lambda: _answers(renewed, run.token())))
                assert answered() == "length"
                assert plain.chat.completions.create(model="math", messages=TURNS, max_tokens=2).choices


def _renewed(run: RunDir, before: Record) -> Record | None:
    now = leader(run)
    return now if now is not None and now.certificate != before.certificate else None


async def _answers(record: Record, token: str) -> bool:
    """Whether new connections have the new certificate, on all of ten."""
    try:
        return await statuses(record, token, 10) == {200: 10}
    except openai.APIConnectionError:
        return False


def _connect_lines(run: str) -> str | None:
    """The base URL of a running `connect`."""
    lines = cli("env", "--run", run).stdout.splitlines()
    url = next(line for line in lines if "OPENAI_BASE_URL" in line).partition("=")[2]
    return url if url.startswith("http://127.0.0.1:") else None


@pytest.mark.parametrize("kind", ["missing", "other key", "no pem", "password"])
def test_a_pair_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    cert, key = make_certificate(tmp_path)
    match kind:
        case "missing":
            key.unlink()
        case "other key":
            other = tmp_path / "other"
            other.mkdir()
            key = make_certificate(other)[1]
        case "no pem":
            cert.write_text("x")
        case "password":
            argv = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:x", "-out", str(key) + "2"]
            subprocess.run(argv, check=True, capture_output=True)
            key = Path(str(key) + "2")
    argv = [sys.executable, "-m", "launch.router", f"run={tmp_path / 'run'}", *QUICK]
    done = subprocess.run(
        [*argv, f"router.tls_cert={cert}", f"router.tls_key={key}"], capture_output=True, text=True, check=False
    )
    expected = {
        "missing": "No such file", "other key": "does not belong to the certificate",
        "no pem": "has no certificate", "password": "has a password",
    }  # fmt: skip
    assert done.returncode == 2
    assert expected[kind] in done.stderr
    assert "router.tls_" in done.stderr
