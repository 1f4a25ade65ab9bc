"""The alert rules and the Grafana dashboard of docs/, in a real Prometheus that finds and reads a router."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
import yaml

from hpc_router.net.addresses import free_port
from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.router.control import engine_metrics
from hpc_router.state.registry import Record, RecordKind, State, publish
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, fake_replica
from tests.router.support import chat, post, ready
from tests.support.needs import ROOT, need
from tests.support.waiting import eventually

RULES: Final = ROOT / "docs/alerts.yml"
DASHBOARD: Final = json.loads((ROOT / "docs/grafana-dashboard.json").read_text())
ENGINE: Final = """\
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_waiting{engine="0"} 2.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:prefix_cache_queries_total{engine="0"} 10.0
vllm:prefix_cache_hits_total{engine="0"} 5.0
"""
LABELS: Final = 'job="hpc_router",run="r",expert="math"'


@pytest.fixture(autouse=True)
def tools() -> None:
    need(bool(shutil.which("prometheus") and shutil.which("promtool")), "prometheus and promtool")


def promtool(*words: str) -> None:
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> dict[str, Any]:
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


CASES: Final = [
    ("HpcRouterDown", 'up{job="hpc_router"}', "1 0x60", "1x60"),
    ("HpcRouterExpertNotReady", f'hpc_router_replicas{{{LABELS},standing="ready"}}', "1 0x60", "2 1x60"),
    ("HpcRouterErrors", f'hpc_router_requests_total{{{LABELS},status="503"}}', "0+10x60", "0x60"),
    ("HpcRouterBrokenResponses", f"hpc_router_broken_responses_total{{{LABELS}}}", "0+1x60", "0x60"),
    ("HpcRouterQueue", f"hpc_router_requests_waiting{{{LABELS}}}", "600x60", "500x60"),
    ("HpcRouterSlowFirstByte", f'hpc_router_first_byte_seconds_bucket{{{LABELS},le="30.0"}}', "0x60", "0+10x60"),
    ("HpcRouterReplicaEjected", f'hpc_router_replicas{{{LABELS},standing="ejected"}}', "1x60", "0x60"),
    ("HpcRouterHandoverGap", f'hpc_router_handovers_total{{{LABELS},outcome="gap"}}', "0x30 1x30", "0x60"),
    ("HpcRouterFileSystemStalls", 'hpc_router_registry_age_seconds{job="hpc_router",run="r"}', "0+60x60", "1x60"),
    (
        "HpcRouterTaskFailures", 'hpc_router_background_task_failures_total{job="hpc_router",run="r",task="probe"}',
        "0+1x60", "0x60",
    ),
    ("HpcRouterRecordsLost", 'hpc_router_records_lost_total{job="hpc_router",run="r"}', "0x30 5x30", "0x60"),
]  # fmt: skip
"""For each alert: a series that causes it, with values per minute for the fault and for normal operation."""
BESIDE: Final = {
    "HpcRouterErrors": [(f'hpc_router_requests_total{{{LABELS},status="200"}}', "0+100x60")],
    "HpcRouterQueue": [(f"hpc_router_requests_waiting_bound{{{LABELS}}}", "1024x60")],
    "HpcRouterSlowFirstByte": [
        (f'hpc_router_first_byte_seconds_bucket{{{LABELS},le="60.0"}}', "0+10x60"),
        (f'hpc_router_first_byte_seconds_bucket{{{LABELS},le="+Inf"}}', "0+10x60"),
    ],
}


def test_the_rules_are_valid_and_every_one_is_tried() -> None:
    promtool("check", "rules", str(RULES))
    assert [case[0] for case in CASES] == list(rules())


@pytest.mark.parametrize(("alert", "series", "fault", "normal"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("faulty", [True, False])
def test_an_alert_fires_at_its_fault_only(
    tmp_path: Path, alert: str, series: str, fault: str, normal: str, faulty: bool
) -> None:
    given = [(series, fault if faulty else normal), *BESIDE.get(alert, [])]
    query = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in given],
                "promql_expr_test": [
                    {"expr": query, "eval_time": "40m", "exp_samples": [{"labels": "{}", "value": int(faulty)}]}
                ],
            }
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(test))
    promtool("test", "rules", str(path))


def queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_rules_and_dashboard_use_metrics_that_exist() -> None:
    listed = set(re.findall(r"`(hpc_router_\w+)`", (ROOT / "docs/metrics.md").read_text()))
    used = {
        re.sub(r"_bucket$", "", name)
        for text in (*queries(), *(rule["expr"] for rule in rules().values()))
        for name in re.findall(r"hpc_router_\w+", text.replace('"hpc_router"', ""))
    }
    assert used <= listed


@asynccontextmanager
async def prometheus(folder: Path, router: RunningRouter, run: Path) -> AsyncIterator[str]:
    """A Prometheus with the configuration of docs/monitoring.md, but for the intervals. Yields its address."""
    [example] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/monitoring.md").read_text(), re.DOTALL)
    text = example.replace("/path/to/docs/alerts.yml", str(RULES)).replace("/path/to/runs/my-run", str(run))
    config = yaml.safe_load(text.replace("15s", "1s").replace("30s", "1s"))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", str(folder / "prometheus.yml"))
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    words = (
        f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}", "--log.level=error",
    )  # fmt: skip
    process = await asyncio.create_subprocess_exec("prometheus", *words)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        await process.wait()


async def test_a_real_prometheus_finds_the_router_and_answers_the_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_metrics, "READ_S", 0.5)
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", expires_at=4e9) as fake,
        a_router(run, a_deployment("math")) as router,
        session() as client,
    ):
        fake.metrics = ENGINE
        publish(run.registry, Record(RecordKind.ROUTER, "router-0.g1", router.url, State.READY, {}, generation=1))
        await ready(router)
        async with prometheus(tmp_path, router, run.path) as url:

            async def result(path: str) -> Any:
                try:
                    answer = await call(client, "GET", f"{url}/api/v1/{path}")
                except Unreachable:
                    return None
                if answer.status == 503:  # it starts
                    return None
                assert answer.status == 200, answer.body
                return answer.body["data"]

            async def value(query: str) -> Any:
                data = await result(f"query?query={quote(query)}")
                return data and data["result"]

            async def up() -> bool:
                found = await value('up{job="hpc_router",run="run"}')
                return bool(found) and found[0]["value"][1] == "1"

            await eventually(up)
            for streamed in (False, True):
                await post(router, chat(stream=streamed))

            async def scraped_twice() -> bool:
                found = await value('count_over_time(hpc_router_requests_total{expert="math",status="200"}[1m])')
                return bool(found) and float(found[0]["value"][1]) >= 2

            await eventually(scraped_twice)
            unanswered = set()
            for query in queries():
                asked = query.replace("$__rate_interval", "1m").replace("$run", ".*").replace("$expert", ".*")
                if not await value(asked):
                    unanswered.add(query)
            # What has no data without faults, queues, decisions of a classifier, and two scrapes of a new series.
            may_lack = re.compile("failovers|broken|queue_seconds|drift|prefix|time_per_output|tokens_total|5..")
            assert [query for query in unanswered if not may_lack.search(query)] == []
            alerts = (await result("rules"))["groups"][0]["rules"]
            assert {alert["name"] for alert in alerts} == set(rules())
            assert {alert["health"] for alert in alerts} <= {"ok", "unknown"}
