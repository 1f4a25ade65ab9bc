"""An expert goes from no replica to one and back, once for each way in which a request may meet it without one."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import openai

from hpc_router.state.job_records import JobDir
from hpc_router.state.run_directory import RunDir
from tests.e2e.deployment import Deployed
from tests.support.waiting import eventually_sync

PROMPT: Any = [{"role": "user", "content": "A shop sells 12 apples for 3 dollars. How many dollars do 20 apples cost?"}]
OVERRIDES = (
    "topology=sim",
    *(f"experts.{name}.replicas=0" for name in ("code", "law", "medicine")),
    "experts.math.replicas=0",
    "experts.math.max_replicas=1",
    "experts.math.engine.options={load_s: 2, ttft_ms: 5, itl_ms: 5}",
)
WITHIN_S = 90


def scalings(one: Deployed) -> list[dict[str, Any]]:
    lines = (one.run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "scaled"]


def jobs(one: Deployed) -> list[JobDir]:
    return [JobDir(RunDir(one.run), folder.name) for folder in (one.run / "jobs").glob("math-0.g*")]


def asleep(one: Deployed, *, after: int) -> bool:
    """Whether math has no replica again, after further scalings than the first `after`, and its last job has ended."""
    counts = [event["replicas"] for event in scalings(one)]
    return len(counts) > after and counts[-1] == 0 and all(job.exit() is not None for job in jobs(one))


def a_stream_waits(client: openai.OpenAI) -> None:
    events = client.chat.completions.create(model="math", messages=PROMPT, max_tokens=4, stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text.startswith("math")


def a_whole_response_waits(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=PROMPT, max_tokens=4, extra_headers={"x-wait": "wait"}
    )
    assert raw.headers["x-expert"] == "math"
    assert (raw.parse().choices[0].message.content or "").startswith("math")


def the_client_comes_again_after_it_was_refused(client: openai.OpenAI) -> None:
    raw = client.with_options(max_retries=60).chat.completions.with_raw_response.create(
        model="math", messages=PROMPT, max_tokens=4, extra_headers={"x-wait": "fail"}
    )
    assert raw.retries_taken >= 1
    assert (raw.parse().choices[0].message.content or "").startswith("math")


def another_expert_serves_and_the_next_request_finds_it_ready(client: openai.OpenAI) -> None:
    def routed() -> str:
        raw = client.chat.completions.with_raw_response.create(model="auto", messages=PROMPT, max_tokens=4)
        assert (raw.parse().choices[0].message.content or "").startswith(raw.headers["x-expert"])
        return str(raw.headers["x-expert"])

    assert routed() == "generalist"
    eventually_sync(lambda: routed() == "math", within_s=WITHIN_S, every_s=0.2)


MODES: tuple[Callable[[openai.OpenAI], None], ...] = (
    a_stream_waits,
    a_whole_response_waits,
    the_client_comes_again_after_it_was_refused,
    another_expert_serves_and_the_next_request_finds_it_ready,
)


def from_zero_to_one_and_back_in_each_mode(one: Deployed) -> None:
    """On a slow machine, a client that comes again late may find that the replica has gone again; it gets another."""
    with one.client() as client:
        for mode in MODES:
            before = len(scalings(one))
            mode(client)
            eventually_sync(partial(asleep, one, after=before), within_s=WITHIN_S)
    scaled = scalings(one)
    assert len(scaled) >= 2 * len(MODES)
    assert [(event["before"], event["replicas"]) for event in scaled] == [(0, 1), (1, 0)] * (len(scaled) // 2)
    assert {event["reason"] for event in scaled[::2]} == {"a request came while it had no replica"}
    assert {(end.ok, end.cut) for job in jobs(one) if (end := job.exit()) is not None} == {(True, 0)}
    told = one.verb("why", "math").stdout
    assert "math has no replica since" in told
    assert "the next request starts one" in told
