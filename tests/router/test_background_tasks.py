"""No background task of worker or control process ends by an exception: each is counted, shown and started again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hpc_router.cluster.commands.set import change, parse_settings
from hpc_router.net import protocol
from hpc_router.router.control.config_watcher import Changes
from hpc_router.router.control.discovery import Discovery
from hpc_router.router.worker import process
from hpc_router.router.worker.control_client import ControlClient
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, fake_replica
from tests.support.waiting import eventually as until


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Raises a ZeroDivisionError the first time, then does what `function` does."""
    failed: list[bool] = []

    def instead(*given: Any, **named: Any) -> Any:
        if not failed:
            failed.append(True)
            raise ZeroDivisionError("a fault of ours")
        return function(*given, **named)

    return instead


async def told(router: RunningRouter) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The metric by task, and what `/status` says."""
    async with aiohttp.ClientSession(headers=router.headers) as session:
        async with session.get(f"{router.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        async with session.get(f"{router.url}/status") as answer:
            status = await answer.json()
    name = 'hpc_router_background_task_failures_total{task="'
    counted = {line.split('"')[1]: int(float(line.rpartition(" ")[2])) for line in lines if line.startswith(name)}
    return counted, status["router"]["task_failures"]


def events(run: RunDir) -> list[dict[str, Any]]:
    path = run.path / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["kind"] == "task_failed"]


@pytest.mark.parametrize(
    ("owner", "method", "task"),
    [
        (process, "_apply_settings", "settings"),
        (ControlClient, "_report_forever", "metrics report"),
        (Discovery, "_take", "registry scan"),
        (Discovery, "_judge", "probe"),
        (Changes, "_look", "config watcher"),
    ],
)
async def test_a_task_that_fails_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, task: str
) -> None:
    run = a_run(tmp_path)
    monkeypatch.setattr(owner, method, once(getattr(owner, method)))
    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math")) as router:
        await until(lambda: bool(router.gateway.table.of("math")) and router.gateway.table.of("math")[0].has_room)
        change(run, *parse_settings(["router.max_in_flight=77"]))
        router.control.changes.look_now()
        if task == "settings":  # the first change is lost with the task; the next one is taken over
            await until(lambda: bool(events(run)))
            change(run, *parse_settings(["router.max_in_flight=78"]))
            router.control.changes.look_now()
        wanted = 78 if task == "settings" else 77
        await until(lambda: router.gateway.deployment.router.max_in_flight == wanted)
        await until(lambda: bool(events(run)))
        counted, shown = await told(router)
    assert counted == {task: 1}
    assert shown == [{"task": task, "count": 1, "last_error": "ZeroDivisionError: a fault of ours"}]
    [event] = events(run)
    assert event["reason"] == f"{task}: ZeroDivisionError: a fault of ours"
    assert (event["replica"], event["expert"], event["by"]) == ("router-0.g1", None, "router-0.g1")


async def test_what_an_agents_tasks_failed_at_is_counted_once(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake:
        fake.health = {"task_failures": {"lease": [2, "OSError: x"]}}
        async with a_router(run, a_deployment("math")) as router:
            await until(lambda: bool(events(run)))
            asked = fake.probes
            await until(lambda: fake.probes > asked + 2)
            counted, shown = await told(router)
    assert counted == {"lease": 2}
    assert shown == [{"task": "lease", "count": 2, "last_error": "OSError: x"}]
    [event] = events(run)
    assert (event["replica"], event["expert"], event["reason"]) == ("math-0.g1", "math", "lease: OSError: x")


@pytest.mark.parametrize("value", [None, 3, {"lease": 1}, {"lease": [True, "x"]}, {"lease": ["1", "x"]}, {"a": [1]}])
def test_an_agent_of_another_version_tells_of_no_failures(value: object) -> None:
    health = protocol.ProbeResponse.from_json({"replica": "a-0.g1", "models": [], "task_failures": value})
    assert health is not None
    assert health.task_failures == {}


async def test_a_setting_that_cannot_be_changes_nothing(tmp_path: Path) -> None:
    """Written past the verb: it is refused, and the next one is taken over."""
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        for value in ("Infinity", "1e400", "NaN", '"inf"', "99999"):
            run.desired.write_text(f'{{"settings": {{"router.hold_mb": {value}}}}}')
            router.control.changes.look_now()
            await until(lambda: router.control.changes.trouble is not None)
            assert "router.hold_mb" in str(router.control.changes.trouble)
            change_back = {"settings": {"router.hold_mb": 4}}
            run.desired.write_text(json.dumps(change_back))
            router.control.changes.look_now()
            await until(lambda: router.control.changes.trouble is None)
        await until(lambda: router.gateway.deployment.router.hold_mb == 4)
        counted, _ = await told(router)
    assert counted == {}
