"""`apply` on a deployment that serves: no request fails and no stream breaks while its jobs are replaced."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
import yaml

from hpc_router import __version__
from hpc_router.client import async_openai_client
from tests.e2e.deployment import Deployed, deployed
from tests.e2e.support import FAST, ask
from tests.support.load import Load
from tests.support.needs import ROOT
from tests.support.waiting import eventually

pytestmark = pytest.mark.e2e

WEIGHTS_MISSING = "experts.math.engine.options.faults=[{kind: load_fail, reason: weights}]"


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    only = [f"~experts.{name}" for name in ("medicine", "law", "generalist")]
    with deployed(
        tmp_path_factory.mktemp("apply"), "topology=sim", FAST, *only, "policy.fallback=null", "cluster.beat_s=0.5"
    ) as one:
        yield one


@asynccontextmanager
async def load_on(one: Deployed) -> AsyncIterator[Load]:
    """Four streams of half a second each and ten requests per second, none of which may fail."""
    async with async_openai_client(one.run, max_retries=0, timeout=60) as client:
        load = Load(client, ("math", "code"), streams=4, per_s=10, stream_tokens=100)
        async with load.running():
            yield load
    assert load.failures == []
    assert load.done["stream"] > 4


async def applied(one: Deployed, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(one.verb, "apply", *overrides, check=check)


def config(one: Deployed) -> dict[str, object]:
    value: dict[str, object] = yaml.safe_load((one.run / "config.yaml").read_text())
    return value


async def test_a_changed_engine_option_rolls_the_experts_replicas(sim: Deployed) -> None:
    async with load_on(sim):
        said = (await applied(sim, "experts.math.engine.options.seed=7", "experts.math.replicas=2")).stdout
    assert "experts.math.engine.options.seed: - -> 7" in said
    assert "math: each of its jobs is replaced" in said
    await eventually(lambda: sorted(sim.ready("math")) == ["math-0.g2", "math-1.g1"])  # the router has found them
    assert sim.ready("code") == ["code-0.g1"], "its config is the same"


def is_unknown(client: openai.OpenAI, model: str) -> bool:
    try:
        ask(client, "hi", model=model)
    except openai.NotFoundError:
        return True
    return False


async def test_an_expert_is_added_and_another_removed(sim: Deployed) -> None:
    """The router hands over, because its config lists the experts."""
    async with load_on(sim):
        await applied(sim, "+experts.poetry={model: sim-poetry, engine: {kind: sim}}")
    with sim.client() as client:
        assert ask(client, "hi", model="poetry")[1]["x-expert"] == "poetry"
    sim.verb("apply", "~experts.poetry")
    with sim.client() as client:
        await eventually(lambda: is_unknown(client, "poetry"))  # once its last record is gone
    await eventually(lambda: "poetry" not in sim.status()["experts"])


async def test_it_stops_when_a_successor_fails_and_the_old_one_serves_on(sim: Deployed) -> None:
    before = sim.ready("math")
    async with load_on(sim):
        failed = await applied(sim, WEIGHTS_MISSING, check=False)
        assert failed.returncode == 1
        assert "stopped: the successor of" in failed.stderr
        assert "weights" in failed.stderr
        assert set(sim.ready("math")) == set(before)
        await applied(sim, "--previous")
    assert set(sim.ready("math")) == set(before), "the config is theirs again"


def test_a_dry_run_and_what_cannot_change_do_nothing(sim: Deployed) -> None:
    before = config(sim)
    assert "router.max_waiting: 1024 -> 7" in sim.verb("apply", "--dry-run", "router.max_waiting=7").stdout
    refused = sim.verb("apply", "name=other", check=False)
    assert refused.returncode == 2
    assert "name cannot change" in refused.stderr
    same = sim.verb("apply", "experts.math.replicas=2", check=False)
    assert (same.returncode, "nothing to apply" in same.stderr) == (2, True)
    unknown = sim.verb("apply", "~experts.maths", check=False)
    assert (unknown.returncode, "there is no 'experts.maths'" in unknown.stderr) == (2, True)
    assert config(sim) == before


async def test_a_run_moves_to_another_version_without_an_interruption(sim: Deployed, tmp_path: Path) -> None:
    """The verb replaces the experts and then the router. The old version's control loop skips its passes."""
    shutil.copytree(ROOT / "hpc_router", tmp_path / "hpc_router")
    init = tmp_path / "hpc_router" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{__version__}"', '"9.9.9"'))
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    async with load_on(sim):
        said = await asyncio.to_thread(sim.verb, "apply", env=environment, cwd=tmp_path)
    assert "jobs of other versions than hpc-router 9.9.9 are replaced" in said.stdout
    status = sim.status()
    assert status["router"]["version"] == "9.9.9"
    (replica,) = await eventually(lambda: sim.ready("code"))
    assert json.loads((sim.run / "jobs" / replica / "job.json").read_text())["revision"] is not None
    assert replica != "code-0.g1"
