"""The deployment that the clients call, and the programs that call it in environments of their own."""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from launch import tiny_model
from tests.e2e.deployment import Deployed, deployed
from tests.support.needs import ROOT, need

NPM = ROOT / "tests/clients/npm"
OFFLINE = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
"""The libraries look nothing up in the network."""
_LIMIT_S = 180
_RETRY_AFTER_S = 1


def program(environment: str, name: str) -> str:
    """The path of a program of an environment that `make clients` creates."""
    path = ROOT / f".venv-{environment}" / "bin" / name
    need(path.exists(), f".venv-{environment} (make clients)")
    return str(path)


def make_tokenizer(folder: Path) -> Path:
    """A folder with a model and its tokenizer, for tools that count tokens themselves."""
    argv = [program("clients", "python"), tiny_model.__file__, str(folder / "model")]
    subprocess.run(argv, env=os.environ | OFFLINE, capture_output=True, timeout=_LIMIT_S, check=True)
    return folder / "model"


@dataclass
class Endpoint:
    one: Deployed
    url: str
    sockets: dict[str, Path]
    """Expert -> the socket of its engine."""

    def python(self, name: str, *, environment: str | None = None) -> dict[str, Any]:
        """What the cases of a program in `tests/clients/programs` returned or raised. Without an environment it runs in
        that of the tests, which has the official clients."""
        python = sys.executable if environment is None else program(environment, "python")
        return self._cases([python, "-m", f"tests.clients.programs.{name}"], name)

    def node(self, name: str) -> dict[str, Any]:
        """What the cases of a program in `tests/clients/npm` returned or threw."""
        need((NPM / "node_modules").exists(), "tests/clients/npm/node_modules (make clients)")
        return self._cases([program("clients", "node"), str(NPM / f"{name}.mjs")], f"{name}.mjs")

    def _cases(self, argv: list[str], name: str) -> dict[str, Any]:
        self.fail_next("recovering")
        own = {"CLIENTS_URL": self.url, "CLIENTS_TOKEN": self.one.token, "CLIENTS_NAME": name}
        value: dict[str, Any] = json.loads(self.run(argv, own).splitlines()[-1])
        return value

    def run(self, argv: list[str], environment: dict[str, str]) -> str:
        """The output of a program that must succeed."""
        done = subprocess.run(
            argv, cwd=ROOT, env=os.environ | OFFLINE | environment, capture_output=True, text=True, timeout=_LIMIT_S,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def fail_next(self, expert: str) -> None:
        """The next request to the expert's engine gets 429 with `Retry-After`."""
        rule = {"kind": "status", "status": 429, "retry_after_s": _RETRY_AFTER_S, "times": 1}
        asyncio.run(_engine(self.sockets[expert], "/sim/faults", [rule]))

    def received(self, expert: str, word: str = "") -> list[dict[str, Any]]:
        """The bodies among the last 64 requests to the expert's engine that contain `word`."""
        answer = asyncio.run(_engine(self.sockets[expert], "/sim/last?n=64"))
        posted = [request for request in answer["requests"] if request["method"] == "POST"]
        bodies = [base64.b64decode(request["body_base64"]) for request in posted]
        return [json.loads(body) for body in bodies if word.encode() in body]


async def _engine(socket: Path, path: str, body: object = None) -> Any:
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
        session.request("GET" if body is None else "POST", f"http://engine{path}", json=body) as response,
    ):
        assert response.status == 200
        return await response.json()


@contextmanager
def served(folder: Path, *, topology: str = "clients") -> Iterator[Endpoint]:
    """A deployment of one of the topologies in `tests/clients/conf`."""
    with deployed(folder, "--config-dir", "tests/clients/conf", f"topology={topology}") as one:
        sockets = list(one.scratch.glob("*/*/engine.sock"))
        models = [asyncio.run(_engine(socket, "/v1/models"))["data"][0]["id"] for socket in sockets]
        yield Endpoint(one, one.url, dict(zip(models, sockets, strict=True)))
