"""One batch from its input to its results, with a router that answers by a script."""

import asyncio
import json
from pathlib import Path

import pytest

from hpc_router.router.batches import batch_run, line_results
from hpc_router.router.batches.journal import Journal, Result
from hpc_router.router.batches.line_results import MAX_FAILURES, LineResponse
from hpc_router.router.batches.stored_batches import Status
from hpc_router.state.run_directory import RunDir, make_run
from tests.router.batches.support import ScriptedRouter, answer, line, results_of, run_of, stored_batch
from tests.support.waiting import eventually

LINES = b"".join(line(n) for n in range(20))
QUESTIONS = [f"question {n}" for n in range(20)]
IDS = [f"line-{n}" for n in range(20)]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_results, "FIRST_PAUSE_S", 0.0)


def number_of(body: bytes) -> int:
    return int(json.loads(body)["messages"][0]["content"].split()[1])


async def test_each_line_gets_its_result_in_order(run: RunDir) -> None:
    batches, batch = stored_batch(run, LINES, user="alice", token_id="0a")
    router = ScriptedRouter()
    await run_of(batches, batch, run, router).run()
    state = batches.state(batch.id)
    assert (state.status, state.total, state.completed, state.failed) == (Status.COMPLETED, 20, 20, 0)
    output, errors = results_of(run, batch)
    assert [one["custom_id"] for one in output] == IDS
    assert [one["response"]["body"]["text"] for one in output] == QUESTIONS
    assert {one["response"]["status_code"] for one in output} == {200}
    assert len({one["id"] for one in output}) == 20
    assert not errors
    assert router.tokens == {"0a"}
    assert sorted(path.name for path in batches.folder(batch.id).iterdir()) == [
        "batch.json",
        "ended.json",
        "state.json",
    ]
    assert not batches.any_active()
    shown = batches.shown(batch)
    assert shown["output_file_id"] == batch.output_file_id
    assert shown["error_file_id"] is None
    assert shown["in_progress_at"] <= shown["finalizing_at"] <= shown["completed_at"]


async def test_a_4xx_is_the_error_of_its_line(run: RunDir) -> None:
    async def script(body: bytes) -> LineResponse:
        refused = json.loads(body)["messages"][0]["content"].endswith("7")
        return LineResponse(400, b'{"error": {\n "code": "bad"}}', "r") if refused else answer(body)

    batches, batch = stored_batch(run, LINES)
    await run_of(batches, batch, run, ScriptedRouter(script)).run()
    output, errors = results_of(run, batch)
    assert [one["custom_id"] for one in errors] == ["line-7", "line-17"]
    assert errors[0]["response"] == {"status_code": 400, "request_id": "r", "body": {"error": {"code": "bad"}}}
    assert errors[0]["error"] is None
    assert len(output) == 18
    assert batches.shown(batch)["request_counts"] == {"total": 20, "completed": 18, "failed": 2}


@pytest.mark.parametrize("status", [None, 429, 503, 502, 500, 401])
async def test_what_another_attempt_can_cure_is_sent_again(run: RunDir, status: int | None) -> None:
    """401: the worker does not know the token yet, which is valid."""
    lost: set[bytes] = set()

    async def script(body: bytes) -> LineResponse:
        first = body not in lost
        lost.add(body)
        return LineResponse(status) if first else answer(body)

    batches, batch = stored_batch(run, LINES, token_id="0a")
    router = ScriptedRouter(script)
    await run_of(batches, batch, run, router).run()
    assert sorted(router.questions) == sorted(QUESTIONS * 2)
    assert [one["custom_id"] for one in results_of(run, batch)[0]] == IDS


@pytest.mark.parametrize(
    ("response", "attempts"),
    [
        (LineResponse(500), MAX_FAILURES),
        (LineResponse(502), MAX_FAILURES),
        (LineResponse(503, final=True), 1),
        (LineResponse(429, final=True), 1),
        (LineResponse(401), 1),
        (LineResponse(403), 1),
        (LineResponse(404), 1),
    ],
    ids=str,
)
async def test_what_no_attempt_cures_becomes_the_lines_error(
    run: RunDir, response: LineResponse, attempts: int
) -> None:
    async def script(body: bytes) -> LineResponse:
        return response

    batches, batch = stored_batch(run, line(0), token_id="0a")
    router = ScriptedRouter(script)
    await run_of(batches, batch, run, router, token_valid=lambda token_id: False).run()
    assert len(router.bodies) == attempts
    (error,) = results_of(run, batch)[1]
    assert error["response"]["status_code"] == response.status


async def test_a_killed_run_is_continued(run: RunDir) -> None:
    """Lines with a result are not sent again. The journal of the killed process ends within a line."""
    batches, batch = stored_batch(run, LINES)
    hanging = asyncio.Event()

    async def hang_after_five(body: bytes) -> LineResponse:
        if number_of(body) >= 5:
            hanging.set()
            await asyncio.Future()
        return answer(body)

    first = ScriptedRouter(hang_after_five)
    killed = asyncio.create_task(run_of(batches, batch, run, first).run())
    await hanging.wait()
    (journal,) = batches.folder(batch.id).glob("journal-*")
    await eventually(lambda: journal.read_bytes().count(b"\n") == 5)
    killed.cancel()  # SIGKILL leaves the same files, as nothing is written at the end
    await asyncio.gather(killed, return_exceptions=True)
    with journal.open("ab") as file:
        file.write(b"1234abcd 6 + {")
    second = ScriptedRouter()
    await run_of(batches, batch, run, second).run()
    assert sorted(second.questions) == sorted(QUESTIONS[5:])
    assert [one["custom_id"] for one in results_of(run, batch)[0]] == IDS


async def test_two_processes_that_run_one_batch_give_one_result_per_line(run: RunDir) -> None:
    batches, batch = stored_batch(run, LINES)
    routers = [ScriptedRouter(), ScriptedRouter()]
    await asyncio.gather(*(run_of(batches, batch, run, one).run() for one in routers), return_exceptions=True)
    await run_of(batches, batch, run, ScriptedRouter()).run()
    assert batches.state(batch.id).status is Status.COMPLETED
    assert [one["custom_id"] for one in results_of(run, batch)[0]] == IDS


async def test_it_stops_with_its_process_and_goes_on_later(run: RunDir) -> None:
    batches, batch = stored_batch(run, LINES)
    stopping = asyncio.Event()

    async def stop_after_five(body: bytes) -> LineResponse:
        if number_of(body) == 5:
            stopping.set()
        return answer(body)

    router = ScriptedRouter(stop_after_five)
    await run_of(batches, batch, run, router, stopping=stopping).run()
    assert len(router.bodies) < 20
    assert batches.state(batch.id).status is Status.IN_PROGRESS
    second = ScriptedRouter()
    await run_of(batches, batch, run, second).run()
    assert sorted(router.questions + second.questions) == sorted(QUESTIONS), "what was in flight has been recorded"
    assert [one["custom_id"] for one in results_of(run, batch)[0]] == IDS


async def test_a_cancelled_batch_keeps_its_results(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_run, "CHECK_S", 0.01)

    async def cancel_after_five(body: bytes) -> LineResponse:
        if number_of(body) >= 5:
            batches.cancel(batch.id)
            await asyncio.Future()
        return answer(body)

    batches, batch = stored_batch(run, LINES)
    router = ScriptedRouter(cancel_after_five)
    running = asyncio.create_task(run_of(batches, batch, run, router).run())
    await running
    shown = batches.shown(batch)
    assert shown["status"] == "cancelled"
    assert shown["cancelling_at"] <= shown["cancelled_at"]
    output, errors = results_of(run, batch)
    assert len(output) == 5
    assert len(errors) == 15
    assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
    assert sorted(one["custom_id"] for one in output + errors) == sorted(IDS)
    batches.cancel(batch.id)
    assert batches.shown(batch)["status"] == "cancelled"


async def test_a_batch_cancelled_before_it_runs(run: RunDir) -> None:
    batches, batch = stored_batch(run, LINES)
    batches.cancel(batch.id)
    assert batches.shown(batch)["status"] == "cancelling"
    router = ScriptedRouter()
    await run_of(batches, batch, run, router).run()
    assert not router.bodies
    assert batches.shown(batch)["status"] == "cancelled"


async def test_an_expired_batch_has_an_error_for_each_other_line(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_run, "CHECK_S", 0.01)
    batches, batch = stored_batch(run, LINES)
    now = batch.created_at

    async def expire_after_five(body: bytes) -> LineResponse:
        nonlocal now
        if number_of(body) >= 5:
            now = batch.expires_at
            return LineResponse(503)
        return answer(body)

    router = ScriptedRouter(expire_after_five)
    await run_of(batches, batch, run, router, now=lambda: now).run()
    shown = batches.shown(batch)
    assert shown["status"] == "expired"
    output, errors = results_of(run, batch)
    assert (len(output), len(errors)) == (5, 15)
    assert {one["error"]["code"] for one in errors} == {"batch_expired"}
    assert [one["custom_id"] for one in errors] == [i for i in IDS if i not in {o["custom_id"] for o in output}]


async def test_a_wrong_input_fails_the_batch(run: RunDir) -> None:
    batches, batch = stored_batch(run, line(0) + b"{\n" + line(0))
    router = ScriptedRouter()
    await run_of(batches, batch, run, router).run()
    shown = batches.shown(batch)
    assert shown["status"] == "failed"
    assert [(e["code"], e["line"]) for e in shown["errors"]["data"]] == [("invalid_json_line", 2)]
    assert not router.bodies
    assert not batches.any_active()


async def test_a_response_that_is_not_json_is_a_text(run: RunDir) -> None:
    async def script(body: bytes) -> LineResponse:
        return LineResponse(200, b"plain\ntext \xff")

    batches, batch = stored_batch(run, line(0))
    await run_of(batches, batch, run, ScriptedRouter(script)).run()
    (one,) = results_of(run, batch)[0]
    assert one["response"]["body"] == "plain\ntext \ufffd"


async def test_results_of_an_ended_batch_do_not_change(run: RunDir) -> None:
    """Another process may still write to a journal of its own."""
    batches, batch = stored_batch(run, LINES)
    await run_of(batches, batch, run, ScriptedRouter()).run()
    before = results_of(run, batch)
    late = Journal(batches.folder(batch.id))
    late.append([Result(0, False, b"late")])
    late.close()
    router = ScriptedRouter()
    await run_of(batches, batch, run, router).run()
    assert not router.bodies
    assert results_of(run, batch) == before
