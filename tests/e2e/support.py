"""Prompts for a deployment, what its router reports, and services in processes of their own."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import openai

from hpc_router.net.http_client import tls_option
from hpc_router.net.protocol import MODELS
from tests.e2e.deployment import Deployed, cli
from tests.support.needs import ROOT
from tests.support.waiting import eventually, eventually_sync

PROMPTS = {
    "code": "Write a Python function that reverses a linked list.",
    "math": "A shop sells 12 apples for 3 dollars. How many dollars do 20 apples cost?",
    "medicine": "What are the symptoms and the treatment of bacterial pneumonia?",
    "law": "The tenant sued the landlord for breach of contract. Can the plaintiff recover damages?",
}


FAST = "cluster.reconcile_s=0.3"


def metrics(one: Deployed) -> dict[str, float]:
    request = urllib.request.Request(f"{one.url}/metrics", headers={"authorization": f"Bearer {one.token}"})
    with urllib.request.urlopen(request) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (li.rpartition(" ") for li in lines if not li.startswith("#"))}


def gauges_are_zero(one: Deployed) -> bool:
    gauges = {k: v for k, v in metrics(one).items() if "requests_in_flight" in k or "requests_waiting{" in k}
    return bool(gauges) and not any(gauges.values())


def ask(client: openai.OpenAI, text: str, *, model: str = "auto") -> tuple[str, dict[str, str]]:
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=4
    )
    return raw.parse().choices[0].message.content or "", dict(raw.headers)


async def are_known(url: str, *tokens: str, certificate: str | None = None) -> bool:
    """Whether every worker of the router knows the tokens, which it takes a second to read: as far as 20 connections
    for each token show it, which the kernel spreads over the workers."""
    connector = aiohttp.TCPConnector(force_close=True, ssl=tls_option(certificate))
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:

        async def status(token: str) -> int:
            async with session.get(url + MODELS, headers={"authorization": f"Bearer {token}"}) as response:
                return response.status

        return set(await asyncio.gather(*(status(token) for token in tokens for _ in range(20)))) == {200}


def until_known(url: str, *tokens: str, certificate: str | None = None) -> None:
    asyncio.run(eventually(lambda: are_known(url, *tokens, certificate=certificate)))


def until_listed(client: openai.OpenAI, *models: str) -> None:
    """Until the router has found the replicas of these experts, which a new router has not at once."""
    eventually_sync(lambda: set(models) <= {model.id for model in client.models.list()})


@contextmanager
def running(*argv: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that must end on SIGTERM at the end of the block."""
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


@contextmanager
def engine(*names: str, options: Sequence[str] = ()) -> Iterator[str]:
    """A simulated engine on a port of its own; yields its address."""
    argv = ["-m", "hpc_router.sim", "--port", "0", "--announce", *options, "--served-model-name", *names]
    with running(*argv) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["listening"]


@contextmanager
def router(run: Path, *overrides: str) -> Iterator[openai.OpenAI]:
    with running("-m", "launch.router", f"run={run}", *overrides):
        eventually_sync(lambda: cli("url", "--run", str(run), check=False).returncode == 0)
        url = cli("url", "--run", str(run)).stdout.strip()
        token = cli("token", "--run", str(run)).stdout.strip()
        with openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, timeout=30) as client:
            yield client
