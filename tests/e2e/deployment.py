"""A whole deployment, started, used and taken down through the command line, as by a user."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from tests.support.needs import ROOT
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

LIMIT_S = 240


def cli(
    *arguments: str, check: bool = True, timeout_s: float = LIMIT_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs `hpc-router ...` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "hpc_router.cli", *arguments],
        capture_output=True, text=True, timeout=timeout_s, check=False, **{"cwd": ROOT, **options},
    )  # fmt: skip
    if check:
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass
class Deployed:
    run: Path
    scratch: Path
    overrides: Sequence[str]

    def verb(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return cli(arguments[0], "--run", str(self.run), *arguments[1:], **options)

    def up(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.verb("up", *arguments, *self.overrides, **options)

    @property
    def url(self) -> str:
        return self.verb("url").stdout.strip()

    @property
    def token(self) -> str:
        return (self.run / "token").read_text().strip()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.token, max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.token, max_retries=0, timeout=60)

    def status(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.verb("status", "--json").stdout)
        return value

    def replicas(self, expert: str) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.status()["experts"].get(expert, {}).get("replicas", [])
        return listed

    def ready(self, expert: str) -> list[str]:
        return [r["replica"] for r in self.replicas(expert) if r["state"] == "ready"]

    def progress(self, replica: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.run / "jobs" / replica / "progress.json").read_text())
        return value

    def processes(self) -> list[int]:
        return with_word(str(self.run), str(self.scratch))

    @contextmanager
    def running(self, *, wait_all: bool) -> Iterator[None]:
        """Starts the deployment, and takes it down at the end of the block. Asserts that nothing is left."""
        try:
            self.up(*(["--wait", "all"] if wait_all else []))
            yield
        finally:
            if self.run.exists():
                self.verb("down")
        self.nothing_left()

    def nothing_left(self) -> None:
        """Asserts that no process, socket or record is left."""
        eventually_sync(lambda: not self.processes())
        assert [p for p in self.scratch.rglob("*") if not p.is_dir()] == []
        assert list((self.run / "registry").iterdir()) == []
        assert not (self.run / "registry.json").exists()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@contextmanager
def deployed(folder: Path, *overrides: str, wait_all: bool = True) -> Iterator[Deployed]:
    """A deployment that is up in the block and always taken down afterwards; nothing is left."""
    scratch = Path(tempfile.mkdtemp(prefix="hpcr-", dir="/tmp"))  # short: a socket's path has 107 bytes
    one = Deployed(folder / "run", scratch, [f"cluster.scratch={scratch}", *overrides])
    with one.running(wait_all=wait_all):
        yield one
    shutil.rmtree(scratch)
