"""One line per request, however it ends, without prompts and tokens; prompts are sampled only where asked for."""

import asyncio
import contextlib
import json
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hpc_router.router.worker import request_records
from hpc_router.state.request_records import read_records
from hpc_router.state.run_directory import RunDir
from hpc_router.state.user_tokens import TokenLimits, create_token
from tests.router.classifying import deployed, trained
from tests.router.fakes import (
    RunningRouter,
    a_deployment,
    a_router,
    a_run,
    answer,
    event,
    fake_replica,
    hang,
    refuse,
    reset,
    stream,
)
from tests.router.support import CHAT, chat, post, ready, session
from tests.router.support import relay as relay
from tests.support.waiting import eventually

DONE = b"data: [DONE]\n\n"
USAGE_EVENT = b'data: {"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'
SECRET = "xylophone"
"""A word of prompts."""


def records_of(run: RunDir, kind: str = "request") -> list[dict[str, Any]]:
    return sorted((r for r in read_records(run, since=0) if r["kind"] == kind), key=lambda r: r["at"])


async def flushed(router: RunningRouter) -> None:
    """Waits until all records of ended requests are in their files."""
    router.gateway.dispatcher.records.flush()
    await router.control.files.run(lambda: None)  # the same thread, which runs one action after another


async def record_of(router: RunningRouter, run: RunDir, request_id: str) -> dict[str, Any]:
    async def found() -> list[dict[str, Any]]:
        await flushed(router)
        return [r for r in records_of(run) if r["id"] == request_id]

    records: list[dict[str, Any]] = await eventually(found)
    [record] = records
    return record


@asynccontextmanager
async def served(run: RunDir, *acts: Any, **options: Any) -> AsyncIterator[RunningRouter]:
    async with (
        fake_replica(run, "math-0.g1", *acts, job_id="4711", node="n7"),
        a_router(run, a_deployment("math", "law", **options)) as router,
    ):
        await ready(router)
        yield router


async def test_a_short_response(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with served(run) as router:
        status, _, headers = await post(router, chat(user=SECRET), **{"x-request-id": "r-1"})
        assert (status, headers["x-request-id"]) == (200, "r-1")
        record = await record_of(router, run, "r-1")
    assert record.pop("at") > 1e9
    first_byte_s, total_s = record.pop("first_byte_s"), record.pop("total_s")
    assert 0 < first_byte_s <= total_s < 60
    assert record == {
        "kind": "request", "id": "r-1", "user": None, "class": "interactive", "path": CHAT, "model": "math",
        "stream": False, "expert": "math", "replica": "math-0.g1", "served_model": "math", "revision": None,
        "job": "4711", "node": "n7",
        "reason": "named", "classifier": None, "status": 200, "outcome": "answered", "token_source": "usage",
        "cluster": None, "score": None, "margin": None, "runner_up": None, "error": None, "attempts": 1, "failed": [],
        "prompt_tokens": 1, "cached_tokens": None, "generated_tokens": 1, "queue_s": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("end", "tokens"), [([DONE], (None, 3, "chunks")), ([USAGE_EVENT, DONE], (3, 7, "usage"))], ids=["plain", "usage"]
)
async def test_a_stream(tmp_path: Path, end: list[bytes], tokens: tuple[Any, ...]) -> None:
    run = a_run(tmp_path)
    async with served(run, stream([event("a")] * 3 + end)) as router:
        await post(router, chat(stream=True), **{"x-request-id": "r-1"})
        record = await record_of(router, run, "r-1")
        assert (record["prompt_tokens"], record["generated_tokens"], record["token_source"]) == tokens
        assert (record["stream"], record["status"], record["outcome"]) == (True, 200, "answered")
        async with session() as s, s.get(f"{router.url}/metrics", headers=router.headers) as response:
            exposed = await response.text()
    assert 'hpc_router_time_per_output_token_seconds_count{expert="math"} 1.0' in exposed
    assert f'hpc_router_tokens_total{{expert="math",kind="{tokens[2]}"}} {float(tokens[1])}' in exposed
    assert ('kind="prompt"} 3.0' in exposed) == (tokens[0] == 3)


async def test_many_requests_are_counted_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one batch, short and long responses, streams and refused requests."""
    monkeypatch.setattr(request_records, "BATCH", 4)
    monkeypatch.setattr(request_records, "MAX_KEPT_BYTES", 200)
    run = a_run(tmp_path)
    usage = b'data: {"id": "%b", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'
    acts = [stream([event("a"), usage % (b"c" * length), DONE]) for length in (1, 1000)] * 3
    async with served(run, *acts, answer) as router:
        for number in range(6):
            await post(router, chat(stream=True), **{"x-request-id": f"stream-{number}"})
        for number in range(7):
            await post(router, chat(), **{"x-request-id": f"short-{number}"})
            await post(router, chat("unknown"), **{"x-request-id": f"refused-{number}"})
        counts = router.gateway.metrics.dump()
        await flushed(router)
    assert [["math", "named", 200], 13] in [[list(labels), count] for labels, count in counts["requests"]]
    tokens = dict(counts["tokens"])
    assert tokens == {("math", "prompt"): 6 * 3 + 7, ("math", "usage"): 6 * 7 + 7}
    found = {record["id"]: record for record in records_of(run)}
    assert len(found) == len(records_of(run)) == 6 + 7 + 7
    assert {found[f"stream-{number}"]["generated_tokens"] for number in range(6)} == {7}
    assert {found[f"short-{number}"]["generated_tokens"] for number in range(7)} == {1}
    assert {found[f"refused-{number}"]["error"] for number in range(7)} == {"unknown_model"}


@pytest.mark.parametrize("kept", [10, 4096])
async def test_the_time_to_the_first_byte_of_each_response_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """A stream, a response that the client gets although it is an error, and a short response."""
    monkeypatch.setattr(request_records, "MAX_KEPT_BYTES", kept)
    run = a_run(tmp_path)
    async with served(run, stream([event("a"), DONE]), refuse(422), answer) as router:
        for number, (is_stream, expected) in enumerate([(True, 200), (False, 422), (False, 200)], 1):
            assert (await post(router, chat(stream=is_stream)))[0] == expected
            [[labels, counts, seconds]] = router.gateway.metrics.dump()["first_byte"]
            assert (list(labels), sum(counts)) == (["math", "math-0.g1"], number)
        await flushed(router)
    assert seconds == pytest.approx(sum(record["first_byte_s"] for record in records_of(run)))


async def test_requests_that_ended_before_records_were_turned_off_are_recorded(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with served(run) as router:
        await post(router, chat(), **{"x-request-id": "before"})
        config = router.gateway.deployment.router
        router.gateway.dispatcher.records.configure(replace(config, records_gb=0), window=10)
        await post(router, chat(), **{"x-request-id": "after"})
        await flushed(router)
        assert dict(router.gateway.metrics.dump()["requests"]) == {("math", "named", 200): 2}
    assert [record["id"] for record in records_of(run)] == ["before"]


async def test_no_record_is_lost_when_the_router_ends(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with served(run) as router:
        for number in range(3):
            await post(router, chat(), **{"x-request-id": f"r-{number}"})
    assert {record["id"] for record in records_of(run)} == {"r-0", "r-1", "r-2"}


async def test_a_decision_of_the_classifier(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    version = trained(run.classifier)
    async with (
        fake_replica(run, "math-0.g1"),
        fake_replica(run, "code-0.g1"),
        a_router(run, deployed(run)) as router,
    ):
        await ready(router, 2)
        body = chat("auto") | {"messages": [{"role": "user", "content": "solve the polynomial"}]}
        _, _, headers = await post(router, body)
        record = await record_of(router, run, headers["x-request-id"])
    assert (record["model"], record["expert"], record["reason"]) == ("auto", "math", "classified")
    assert record["runner_up"] == "code"
    assert record["cluster"]
    assert 0 < record["margin"] <= record["score"] <= 1.0001
    assert record["classifier"] == router.gateway.policy.version
    assert version is None or record["classifier"] == version


async def test_a_failed_attempt_is_told(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", refuse(503)),
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math", retry_least_per_s=1000.0)) as router,
    ):
        await ready(router, 2)
        for number in range(40):  # the conversation decides which replica is tried first
            body = chat() | {"messages": [{"role": "user", "content": f"{number}"}]}
            assert (await post(router, body, **{"x-request-id": f"r-{number}"}))[0] == 200
        await flushed(router)
    found = records_of(run)
    assert len(found) == 40
    assert {r["replica"] for r in found} == {"math-1.g1"}
    retried = [r for r in found if r["attempts"] == 2]
    assert retried
    assert all(r["failed"] == [{"replica": "math-0.g1", "cause": 503}] for r in retried)
    assert all(r["failed"] == [] for r in found if r["attempts"] == 1)


async def test_a_response_that_breaks(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with served(run, stream([event("a")] * 2, then="reset")) as router:
        await post(router, chat(stream=True), **{"x-request-id": "r-1"})
        record = await record_of(router, run, "r-1")
    assert (record["status"], record["outcome"], record["generated_tokens"]) == (200, "broken", 2)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves(tmp_path: Path, streamed: bool) -> None:
    run = a_run(tmp_path)
    act = stream([event("a")], then="hang") if streamed else hang
    async with served(run, act) as router:
        async with session() as s:
            headers = router.headers | {"x-request-id": "r-1"}
            request = asyncio.ensure_future(s.post(router.url + CHAT, json=chat(stream=streamed), headers=headers))
            await eventually(lambda: router.gateway.in_flight.count == 1)
            if streamed:
                response = await request
                await response.content.readany()
                response.close()
            request.cancel()
            with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
                await request
        await eventually(lambda: router.gateway.in_flight.count == 0)
        record = await record_of(router, run, "r-1")
    assert (record["outcome"], record["status"]) == ("cancelled", 200 if streamed else None)
    assert record["replica"] == "math-0.g1"


async def test_what_the_router_refuses(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    _, token = create_token(run, "alice", limits=TokenLimits(requests=1))
    async with served(run, queue_timeout_s=0.2) as router:
        as_alice = {"authorization": f"Bearer {token}"}
        await eventually(lambda: len(router.gateway.users) == 1)
        assert (await post(router, chat(SECRET), **{"x-request-id": "unknown"}))[0] == 404
        assert (await post(router, chat("law"), **{"x-request-id": "nothing"}))[0] == 503
        assert (await post(router, b'{"' + SECRET.encode(), **{"x-request-id": "broken"}))[0] == 400
        assert (await post(router, chat(), **{"x-request-id": "first"}, **as_alice))[0] == 200
        assert (await post(router, chat(), **{"x-request-id": "second"}, **as_alice))[0] == 429
        assert (await post(router, chat(), authorization="Bearer wrong", **{"x-request-id": "stranger"}))[0] == 401
        await flushed(router)
    found = {r["id"]: (r["status"], r["outcome"], r["error"], r["expert"], r["user"]) for r in records_of(run)}
    assert found == {
        "unknown": (404, "refused", "unknown_model", None, None),
        "nothing": (503, "refused", "unavailable", "law", None),
        "broken": (400, "refused", "bad_request", None, None),
        "first": (200, "answered", None, "math", "alice"),
        "second": (429, "refused", "rate_limited", None, "alice"),
    }
    keys = {frozenset(record) for record in records_of(run)}
    assert len(keys) == 1, "all records have the same keys"
    written = b"".join(path.read_bytes() for path in run.records.iterdir())
    assert SECRET.encode() not in written
    assert token.encode() not in written


async def test_feedback_is_recorded(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    _, token = create_token(run, "alice")
    async with served(run) as router:
        await eventually(lambda: len(router.gateway.users) == 1)
        as_alice = {"authorization": f"Bearer {token}"}
        assert (await post(router, {"id": "r-1", "score": 0.5}, path="/feedback", **as_alice))[0] == 200
        for body, param in (
            ({"id": "r 1", "score": 1}, "id"),
            ({"score": 1}, "id"),
            ({"id": "r-1", "score": "1"}, "score"),
            ({"id": "r-1", "score": True}, "score"),
            ({"id": "r-1", "score": 1001}, "score"),
            ({"id": "r-1"}, "score"),
        ):
            status, value, _ = await post(router, body, path="/feedback")
            assert (status, value["error"]["param"]) == (400, param)
        assert (await post(router, {"id": "r-1", "score": 1}, path="/feedback", authorization="x"))[0] == 401
        await flushed(router)
    [record] = records_of(run, "feedback")
    assert (record["id"], record["score"], record["user"]) == ("r-1", 0.5, "alice")


async def test_samples_of_prompts_only_where_asked_for(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    body = chat() | {"messages": [{"role": "user", "content": f"{SECRET} \ud800"}]}
    async with served(run, sample_prompts=1.0) as router:
        _, _, headers = await post(router, body)
        await record_of(router, run, headers["x-request-id"])
    [path] = run.samples.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    row = json.loads(path.read_bytes())
    assert row.pop("at") > 1e9
    assert row == {
        "id": headers["x-request-id"], "user": None, "expert": "math", "reason": "named", "prompt": f"{SECRET} ?"
    }  # fmt: skip
    assert SECRET.encode() not in b"".join(path.read_bytes() for path in run.records.iterdir())


async def test_no_records(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with served(run, records_gb=0, sample_prompts=1.0) as router:
        assert (await post(router, chat()))[0] == 200
        assert (await post(router, chat("unknown")))[0] == 404
        status, value, _ = await post(router, {"id": "r-1", "score": 1}, path="/feedback")
        assert status == 400
        assert "router.records_gb" in value["error"]["message"]
        await flushed(router)
    assert not run.records.exists()
    assert not run.samples.exists()


async def test_a_file_system_that_hangs_delays_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records wait up to a limit; then they are dropped and counted, and the rest is written when it works again."""
    run, hanging = a_run(tmp_path), threading.Event()
    monkeypatch.setattr(request_records, "MAX_UNWRITTEN_BYTES", 3000)
    async with served(run) as router:
        records = router.gateway.dispatcher.records
        files, records._files = records._files, type(records._files)("hanging")
        records._files.post(hanging.wait)
        for number in range(8):
            assert (await post(router, chat(), **{"x-request-id": f"r-{number}"}))[0] == 200
            await eventually(lambda: router.gateway.in_flight.count == 0)
            records.flush()
        assert not run.records.exists()
        hanging.set()
        await records._files.run(lambda: None)
        written = len(records_of(run))
        async with session() as s, s.get(f"{router.url}/metrics", headers=router.headers) as response:
            assert f"hpc_router_records_lost_total {float(8 - written)}" in await response.text()
        assert 1 < written < 8
        await post(router, chat(), **{"x-request-id": "after"})
        await eventually(lambda: router.gateway.in_flight.count == 0)
        records.flush()
        await records._files.run(lambda: None)
        assert "after" in {record["id"] for record in records_of(run)}
        records._files.close(timeout_s=5)
        records._files = files


async def test_a_trace_context_reaches_the_engine(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    parent, state = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=1"
    async with (
        fake_replica(run, "math-0.g1", reset, answer) as fake,
        fake_replica(run, "math-1.g1", answer) as other,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        for streamed in (False, True):
            await post(router, chat(stream=streamed), traceparent=parent, tracestate=state)
    seen = [*fake.headers, *other.headers]
    assert len(seen) >= 2
    assert {(h["traceparent"], h["tracestate"]) for h in seen} == {(parent, state)}
