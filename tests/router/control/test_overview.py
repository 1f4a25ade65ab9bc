"""The overview: rates and latencies from two samples, what needs attention, and its two HTTP forms."""

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.router.control import process
from hpc_router.router.control.overview import (
    MAX_EVENTS,
    CounterSample,
    Queues,
    RunFiles,
    Traffic,
    overview,
    read_run_files,
)
from hpc_router.router.metrics import LATENCY_BOUNDS_S, Metrics
from hpc_router.state.atomic_files import replace_json
from hpc_router.state.gpu_hours import ExpertUsage, Usage, parse_usage
from hpc_router.state.stamped_file import StampedFile
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, fake_replica, refuse
from tests.router.support import chat, post
from tests.support.waiting import GUARD_S, eventually


def counted(**answered: int) -> Metrics:
    """`math="3"`: three answers of math, one of them after 0.03 s and the others after 0.2 s."""
    metrics = Metrics()
    for expert, count in answered.items():
        for number in range(count):
            metrics.requests.add(expert, "classified", 200)
            metrics.first_byte.add(0.03 if number == 0 else 0.2, expert, f"{expert}-0.g1")
    return metrics


def traffic(*samples: CounterSample) -> Traffic:
    made = Traffic()
    for sample in samples:
        made.add(sample)
    return made


def test_one_sample_has_latencies_since_the_start_and_no_rates() -> None:
    one = traffic(CounterSample.of(counted(math=3), 5.0))
    assert one.window_s is None
    found = one.of_expert("math")
    assert (found["requests_per_s"], found["failed_per_s"], found["queue_s"]) == (None, None, None)
    assert found["first_byte_s"] == {"p50": 0.1375, "p99": 0.2477}
    assert one.routes() == [{"expert": "math", "reason": "classified", "requests": 3}]
    assert one.of_expert("law")["first_byte_s"] is None


def test_two_samples_give_what_happened_between_them() -> None:
    later = counted(math=3, law=1)
    later.requests.add("math", "named", 503)
    later.broken.add("law")
    found = traffic(CounterSample.of(counted(math=1), 5.0), CounterSample.of(later, 9.0))
    assert found.window_s == 4.0
    math, law = found.of_expert("math"), found.of_expert("law")
    assert (math["requests_per_s"], math["failed_per_s"]) == (0.75, 0.25)
    assert (law["requests_per_s"], law["failed_per_s"]) == (0.25, 0.25)
    assert math["first_byte_s"] == {"p50": 0.175, "p99": 0.2485}
    assert found.routes() == [
        {"expert": "math", "reason": "classified", "requests": 2},
        {"expert": "law", "reason": "classified", "requests": 1},
        {"expert": "math", "reason": "named", "requests": 1},
    ]


def test_the_time_per_token_has_buckets_of_its_own() -> None:
    metrics = counted(math=1)
    for _ in range(10):
        metrics.token_time.add(0.0125, "math")
    found = traffic(CounterSample.of(metrics, 5.0))
    assert found.of_expert("math")["token_s"] == {"p50": 0.0125, "p99": 0.0149}
    assert found.of_expert("law")["token_s"] is None


def test_the_window_slides_and_ends_with_a_pause_or_with_lost_counts() -> None:
    samples = [CounterSample.of(counted(math=number), float(at)) for number, at in enumerate(range(0, 180, 20))]
    assert traffic(*samples).window_s == 60.0
    assert traffic(samples[0], replace(samples[1], at=100.0)).window_s is None
    assert traffic(samples[3], samples[4], replace(samples[1], at=81.0)).window_s is None


@given(st.lists(st.floats(0.001, 300.0), min_size=1, max_size=50), st.sampled_from([0.5, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    metrics = Metrics()
    for value in values:
        metrics.first_byte.add(value, "math", "math-0.g1")
    found = traffic(CounterSample.of(metrics, 1.0)).of_expert("math")["first_byte_s"]["p50" if share == 0.5 else "p99"]
    true = sorted(values)[max(0, -(-len(values) * int(share * 100) // 100) - 1)]
    edges = [0.0, *LATENCY_BOUNDS_S]
    at = next(at for at, bound in enumerate(LATENCY_BOUNDS_S) if true <= bound)
    assert edges[at] - 1e-4 <= found <= edges[at + 1] + 1e-4


def test_values_above_the_last_bound_count_as_it() -> None:
    metrics = Metrics()
    metrics.first_byte.add(1e9, "math", "math-0.g1")
    assert traffic(CounterSample.of(metrics, 1.0)).of_expert("math")["first_byte_s"]["p50"] == LATENCY_BOUNDS_S[-1]


USAGE = Usage(50.0, {"math": ExpertUsage({"busy": 1800.0, "idle": 5400.0}, tokens=900, last_request_at=48.0)})


def test_files_that_are_absent_or_damaged_count_as_empty(tmp_path: Path) -> None:
    usage, events = tmp_path / "gpu_hours.json", tmp_path / "events.jsonl"
    hours = StampedFile(usage, parse_usage)
    assert read_run_files(events, hours) == RunFiles([], None)
    usage.write_text("[1")
    events.write_bytes(b'{"kind": "submitted", "replica": "math-0.g1", "at": 1.5, "secret": "x"}\n\xff{"half\n[]\n')
    assert read_run_files(events, hours).events == [
        {"at": 1.5, "kind": "submitted", "replica": "math-0.g1", "expert": None, "reason": None, "by": None}
    ]
    usage.write_text("[]")
    assert read_run_files(events, hours).usage is None
    replace_json(usage, USAGE.to_json())
    assert read_run_files(events, hours).usage == USAGE


def test_the_newest_events_of_a_long_file_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"at": number, "kind": "submitted", "reason": "x" * 1000}) for number in range(1000)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    hours = StampedFile(tmp_path / "gpu_hours.json", parse_usage)
    events = read_run_files(tmp_path / "events.jsonl", hours).events
    assert [event["at"] for event in events] == list(range(999, 999 - len(events), -1))
    assert 20 <= len(events) <= MAX_EVENTS
    assert {len(event["reason"]) for event in events} == {300}


STATUS: dict[str, Any] = {
    "router": {"draining": True, "settings_trouble": "policy.kind: no", "write_trouble": None,
               "task_failures": [{"task": "probes", "count": 1, "last_error": "KeyError: 'x'"}]},
    "policy": {"kind": "classifier"},
    "experts": {
        "law": {"ready": 0, "waiting": 2, "wait_s": 1.25, "replicas": []},
        "math": {"ready": 1, "waiting": 0, "wait_s": None, "replicas": [
            {"replica": "math-0.g1", "state": "ejected", "trouble": None, "sick": None, "silent": True},
            {"replica": "math-1.g1", "state": "ready", "trouble": None, "sick": "is slow", "silent": False},
        ]},
    },
}  # fmt: skip


def test_what_needs_attention_is_said_in_words() -> None:
    forecast = {
        "experts": {"law": {"ready_at": 90.0, "replica": "law-0.g2", "reason": "Resources"}},
        "starting": [{"ready_at": 90.0, "replica": "law-0.g2", "reason": "Resources"}],
        "handovers": [{"replica": "math-0.g1", "late_s": 70.4, "reason": "Priority"}, "damaged"],
    }
    none: Queues = {"interactive": {"waiting": 0, "oldest_s": None}, "batch": {"waiting": 0, "oldest_s": None}}
    some: Queues = {"interactive": {"waiting": 0, "oldest_s": None}, "batch": {"waiting": 2, "oldest_s": 7.25}}
    later = counted(math=1)
    later.requests.add("math", "named", 500)
    found = traffic(CounterSample.of(counted(math=1), 5.0), CounterSample.of(later, 15.0))
    value = overview(
        STATUS, found, RunFiles(usage=USAGE), a_deployment("math", "law"), forecast=forecast,
        queues={"law": some, "math": none}, at=60.0,
    )  # fmt: skip
    assert value["attention"] == [
        "the router is draining",
        "a change was not applied: policy.kind: no",
        "the background task 'probes' failed: KeyError: 'x'",
        "law has no ready replica: law-0.g2, Resources",
        "law: 2 requests wait for a replica (2 batch, the oldest for 7.2 s); a new one waits for about 1.2 s",
        "math: 0.1 failed requests per second",
        "math-0.g1 is ejected: unknown cause",
        "math-0.g1 does not renew its record",
        "math-1.g1 is slow",
        "the successor of math-0.g1 will be 70 s late: Priority",
    ]
    assert value["starting"] == forecast["starting"]
    law, math = value["experts"]
    assert (law["queues"], law["usage"]) == (some, None)
    assert math["queues"] == none
    assert math["usage"] == {
        "gpu_hours": {"starting": 0.0, "busy": 0.5, "idle": 1.5, "draining": 0.0}, "idle_share": 0.75, "tokens": 900,
        "tokens_per_gpu_hour": 450.0, "last_request_at": 48.0, "idle_s": 12.0,
    }  # fmt: skip
    assert value["settings"]["policy.kind"] == "model_field"
    assert not [key for key in value["settings"] if "token" in key or "secret" in key]


async def get(router: RunningRouter, path: str, **options: Any) -> aiohttp.ClientResponse:
    async with aiohttp.ClientSession() as session:
        response = await session.request(options.pop("method", "GET"), router.url + path, **options)
        await response.read()
        return response


async def test_the_router_shows_its_traffic_without_prompts(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1") as _,
        fake_replica(run, "law-0.g1", refuse(400)),
        a_router(run, a_deployment("math", "law")) as router,
    ):
        await eventually(lambda: len(router.gateway.table.ready()) == 2)
        assert (await post(router, chat("math", messages=[{"role": "user", "content": "a secret question"}])))[0] == 200
        assert (await post(router, chat("law")))[0] == 400
        response = await get(router, "/overview", headers=router.headers)
        value = await response.json()
        experts = {one["expert"]: one for one in value["experts"]}
        assert experts["math"]["first_byte_s"] is not None
        assert [one["replica"] for one in experts["math"]["replicas"]] == ["math-0.g1"]
        assert {(one["expert"], one["reason"], one["requests"]) for one in value["routes"]} == {
            ("math", "named", 1),
            ("law", "named", 1),
        }
        text = await response.text()
        assert "a secret question" not in text
        assert router.token not in text


async def test_the_data_wants_the_token_and_the_page_has_none(tmp_path: Path) -> None:
    async with a_router(a_run(tmp_path), a_deployment("math")) as router:
        for path in ("/overview", "/overview?follow=true"):
            assert (await get(router, path)).status == 401
        page = await get(router, "/dashboard")
        assert (page.status, page.content_type) == (200, "text/html")
        assert "math" not in await page.text()
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert (await get(router, "/dashboard", method="HEAD")).status == 200
        assert (await get(router, "/dashboard", method="POST")).status == 405
        refused = await get(router, "/overview?follow=maybe", headers=router.headers)
        assert refused.status == 400
        assert "valid: true, false" in (await refused.json())["error"]["message"]
        assert (await get(router, "/overview?follow=true", method="HEAD", headers=router.headers)).status == 200


@pytest.fixture
def quick_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_router.router.worker.dashboard.PERIOD_S", 0.01)


@pytest.mark.usefixtures("quick_lines")
async def test_a_page_gets_a_line_per_look_until_the_router_drains(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        a_router(run, a_deployment("math")) as router,
        aiohttp.ClientSession() as session,
        session.get(f"{router.url}/overview?follow=true", headers=router.headers) as response,
    ):
        assert response.content_type == "application/x-ndjson"
        lines = [json.loads(await asyncio.wait_for(response.content.readline(), GUARD_S)) for _ in range(3)]
        assert all(line["experts"][0]["expert"] == "math" for line in lines)
        router.gateway.draining = True
        async with asyncio.timeout(GUARD_S):
            rest = [json.loads(line) async for line in response.content]
        assert all("experts" in line for line in rest)


async def test_pages_that_look_together_share_one_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = 0
    count = process.ControlProcess._counted

    async def counting(self: process.ControlProcess) -> Metrics:
        nonlocal counts
        counts += 1
        return await count(self)

    monkeypatch.setattr(process, "SAMPLE_S", 1e9)
    async with a_router(a_run(tmp_path), a_deployment("math")) as router:
        monkeypatch.setattr(process.ControlProcess, "_counted", counting)
        values = await asyncio.gather(*(router.control.overview() for _ in range(10)))
        assert counts == 1
        assert all(value is values[0] for value in values)


async def test_a_run_directory_that_hangs_does_not_stop_the_overview(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = threading.Event()
    read = read_run_files

    def slow(events: Path, usage: StampedFile[Usage]) -> RunFiles:
        hanging.wait(GUARD_S)
        return read(events, usage)

    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        await ready_or_not(router)
        monkeypatch.setattr(process, "READ_S", 0.01)
        monkeypatch.setattr(process, "SAMPLE_S", 0.0)
        monkeypatch.setattr(process, "read_run_files", slow)
        run.event("submitted", replica="math-0.g1")
        assert (await router.control.overview())["events"] == []
        hanging.set()

        async def has_event() -> bool:
            return [event["kind"] for event in (await router.control.overview())["events"]] == ["submitted"]

        await eventually(has_event)


async def ready_or_not(router: RunningRouter) -> None:
    """Waits until the control process has informed its workers."""
    await asyncio.wait_for(router.control.workers.informed.wait(), GUARD_S)
