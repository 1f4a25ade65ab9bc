"""A router that decides by a classifier: what it counts of its decisions, of a shadow's, and of drift."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hpc_router.config.schema import Deployment
from hpc_router.router.control import config_watcher
from hpc_router.router.control.config_watcher import ConfigWatcher
from hpc_router.router.policies import load_policy
from hpc_router.router.replicas.replica import RoutingState
from hpc_router.routing.policy import Policy, versions
from hpc_router.state.io_thread import FileThread
from hpc_router.state.run_directory import RunDir
from tests.router.classifying import CODE, EXPERTS, GREEK, MATH, SWAPPED, deployed, trained
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, fake_replica
from tests.support.waiting import eventually


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return a_run(tmp_path)


@asynccontextmanager
async def serving(run: RunDir, deployment: Deployment) -> AsyncIterator[RunningRouter]:
    async with (
        fake_replica(run, "math-0.g1"),
        fake_replica(run, "code-0.g1"),
        a_router(run, deployment) as router,
    ):
        await eventually(lambda: sum(r.state is RoutingState.READY for r in router.gateway.table.all()) == 2)
        yield router


async def asked(router: RunningRouter, prompts: Sequence[str]) -> list[str]:
    """-> whose answer each prompt had."""
    experts = []
    async with aiohttp.ClientSession(router.url, headers=router.headers) as session:
        for prompt in prompts:
            body = {"model": "auto", "messages": [{"role": "user", "content": prompt}]}
            async with session.post("/v1/chat/completions", json=body) as response:
                assert response.status == 200
                experts.append(response.headers["x-expert"])
    return experts


async def read(router: RunningRouter) -> tuple[dict[str, Any], dict[str, float]]:
    """What `/status` says of the policy, and the values in `/metrics` by name and labels."""
    async with aiohttp.ClientSession(router.url, headers=router.headers) as session:
        async with session.get("/status") as response:
            status = await response.json()
        async with session.get("/metrics") as response:
            lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
    return status["policy"], {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def shadowed(values: dict[str, float], artefact: str, shadow: str, agreed: str) -> float:
    name = "hpc_router_shadow_decisions_total"
    return values.get(f'{name}{{agreed="{agreed}",artefact="{artefact}",shadow="{shadow}"}}', 0.0)


async def test_a_shadow_is_counted_and_has_no_say(run: RunDir, tmp_path: Path) -> None:
    artefact, shadow = trained(run.classifier), trained(tmp_path / "shadow", SWAPPED)
    async with serving(run, deployed(run, shadow=str(tmp_path / "shadow"))) as router:
        assert await asked(router, [CODE, MATH, GREEK]) == ["code", "math", "math"]
        _, values = await read(router)
        assert shadowed(values, artefact, shadow, "no") == 2
        assert shadowed(values, artefact, shadow, "yes") == 1, "both know no word of it and fall back"


async def test_a_retrained_shadow_is_loaded(run: RunDir, tmp_path: Path) -> None:
    artefact = trained(run.classifier)
    first = trained(tmp_path / "shadow", SWAPPED)
    async with serving(run, deployed(run, shadow=str(tmp_path / "shadow"))) as router:
        await eventually(lambda: router.control.config_watcher._stamp_loaded)
        await asked(router, [CODE])
        second = trained(tmp_path / "shadow", EXPERTS | {"code": [*EXPERTS["code"], "a shell script"]})
        await eventually(lambda: versions(router.gateway.policy) == (artefact, second))
        await asked(router, [CODE])
        _, values = await read(router)
        assert (shadowed(values, artefact, first, "no"), shadowed(values, artefact, second, "yes")) == (1, 1)


async def test_an_artefact_replaced_while_it_is_read_is_not_missed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(run.classifier)
    found: list[str | None] = []
    load, late = load_policy, [SWAPPED]

    def load_and_replace(run: RunDir, deployment: Deployment) -> Policy:
        policy = load(run, deployment)
        if late:
            trained(run.classifier, late.pop())
        return policy

    monkeypatch.setattr(config_watcher, "load_policy", load_and_replace)
    files = FileThread("test")
    watcher = ConfigWatcher(run, deployed(run), files, lambda _, policy: found.append(policy.version))
    await watcher._check()
    await watcher._check()
    await watcher._check()
    assert len(found) == len(set(found)) == 2
    files.close(timeout_s=5)


async def test_a_setting_replaced_while_it_is_read_is_not_missed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    read, later = RunDir.read_desired, [{"settings": {"router.hold_mb": 4}}]

    def read_and_replace(run: RunDir) -> dict[str, Any]:
        desired = read(run)
        if later:
            run.write_desired(later.pop())
        return desired

    monkeypatch.setattr(RunDir, "read_desired", read_and_replace)
    files = FileThread("test")
    seen: list[float] = []
    watcher = ConfigWatcher(run, a_deployment("math"), files, lambda found, _: seen.append(found.router.hold_mb))
    await watcher._check()
    await watcher._check()
    assert seen == [8.0, 4.0]
    files.close(timeout_s=5)


async def test_status_and_metrics_show_drift(run: RunDir) -> None:
    """Trained on both experts' prompts alike; now three of four prompts are code's."""
    trained(run.classifier)
    async with serving(run, deployed(run)) as router:
        assert (await read(router))[0]["drift"] is None, "nothing was decided yet"
        await asked(router, [CODE, CODE, CODE, MATH])
        policy, values = await read(router)
        assert policy["drift"]["decisions"] == 4
        assert policy["drift"]["cluster_distance"] == values["hpc_router_drift_cluster_distance"] == 0.25
        assert policy["drift"]["low_margin_share"] == values["hpc_router_drift_low_margin_share"] == 0
        trained_share = values["hpc_router_drift_trained_low_margin_share"]
        assert policy["drift"]["trained_low_margin_share"] == trained_share


async def test_low_margins_are_drift_too(run: RunDir) -> None:
    trained(run.classifier)
    async with serving(run, deployed(run, margin=10.0)) as router:
        await asked(router, [CODE, MATH])
        policy, values = await read(router)
        assert policy["drift"]["low_margin_share"] == values["hpc_router_drift_low_margin_share"] == 1
