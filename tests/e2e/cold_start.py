"""An expert goes from no replica to one and back, once for each way in which a request may meet it without one."""

import json
from collections.abc import Callable
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


def asleep(one: Deployed, times: int) -> bool:
    """Whether math has gone to sleep that often, and its last job has ended."""
    jobs = [JobDir(RunDir(one.run), folder.name) for folder in (one.run / "jobs").glob("math-0.g*")]
    return len(scalings(one)) == 2 * times and len(jobs) == times and all(job.exit() for job in jobs)


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
    with one.client() as client:
        for times, mode in enumerate(MODES):
            assert asleep(one, times)
            mode(client)
            eventually_sync(lambda times=times: asleep(one, times + 1), within_s=WITHIN_S)  # type: ignore[misc]
    scaled = scalings(one)
    assert [(event["before"], event["replicas"]) for event in scaled] == [(0, 1), (1, 0)] * len(MODES)
    assert {event["reason"] for event in scaled[::2]} == {"a request came while it had no replica"}
    ends = [JobDir(RunDir(one.run), folder.name).exit() for folder in (one.run / "jobs").glob("math-0.g*")]
    assert [(end.ok, end.cut) for end in ends if end is not None] == [(True, 0)] * len(MODES)
    told = one.verb("why", "math").stdout
    assert "math has no replica since" in told
    assert "the next request starts one" in told
