"""A whole deployment with simulated engines: prompts are routed, processes are killed, experts are scaled."""

import asyncio
import base64
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from hpc_router.state.registry import split_replica
from tests.e2e.deployment import Deployed, cli, deployed, kill
from tests.e2e.support import FAST, PROMPTS, ask, gauges_are_zero
from tests.routing.samples import EXPLANATION_KEYS
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("sim")
    with deployed(folder, "topology=sim", FAST, "experts.math.replicas=2", "cluster.beat_s=0.5") as one:
        yield one


def test_prompts_reach_the_expert_of_their_domain(sim: Deployed) -> None:
    with sim.client() as client:
        for expert, prompt in PROMPTS.items():
            _, headers = ask(client, prompt)
            assert (headers["x-expert"], headers["x-route-reason"]) == (expert, "classified")
        _, headers = ask(client, "ωψξ ζηθ")
        assert (headers["x-expert"], headers["x-route-reason"]) == ("generalist", "no_known_terms")
        for name in [*PROMPTS, "generalist"]:
            assert ask(client, "hi", model=name)[1]["x-expert"] == name


def test_progress_for_scripts(sim: Deployed) -> None:
    """`up` of a deployment that serves already has the same events as at its start, and nothing else on stdout."""
    events = [json.loads(line) for line in sim.up("--json").stdout.splitlines()]
    assert events[0]["event"] == "run"
    replicas = [event for event in events if event["event"] == "replica"]
    assert {event["expert"] for event in replicas} >= {*PROMPTS, "generalist"}
    assert {event["state"] for event in replicas} == {"ready"}
    assert (events[-1]["event"], events[-1]["url"], events[-1]["failed"]) == ("serving", f"{sim.url}/v1", [])


def test_the_router_reads_the_metrics_of_the_engines(sim: Deployed) -> None:
    """Through the agents, with the replicas' keys."""
    loads = eventually_sync(
        lambda: [r["engine_load"] for r in sim.replicas("math") if r["engine_load"] is not None], every_s=0.5
    )
    assert all(load["running"] is not None and 0 <= load["kv_use"] <= 1 for load in loads)


def test_later_turns_stay_where_the_first_went(sim: Deployed) -> None:
    turns = [
        {"role": "user", "content": PROMPTS["medicine"]},
        {"role": "assistant", "content": "..."},
        {"role": "user", "content": "And how long does that take?"},
    ]
    with sim.client() as client:
        raw = client.chat.completions.with_raw_response.create(model="auto", messages=turns, max_tokens=2)  # type: ignore[arg-type]
        assert raw.headers["x-expert"] == "medicine"


def test_the_openai_client_works_unmodified(sim: Deployed) -> None:
    """Chat, streaming with usage, completions, embeddings, models and tools."""
    with sim.client() as client:
        listed = {m.id: m for m in client.models.list()}
        assert set(listed) == {"auto", "generalist", *PROMPTS}
        assert listed["math"].model_dump()["simulated"] is True
        chunks = list(
            client.chat.completions.create(
                model="math", messages=[{"role": "user", "content": "hi"}], max_tokens=5, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 5
        assert client.completions.create(model="auto", prompt=PROMPTS["code"], max_tokens=3).choices[0].text
        assert len(client.embeddings.create(model="math", input=["a", "b"]).data) == 2
        tool: Any = {
            "type": "function",
            "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
        }
        called = client.chat.completions.create(
            model="math", messages=[{"role": "user", "content": "hi"}], tools=[tool],
            tool_choice={"type": "function", "function": {"name": "add"}},
        )  # fmt: skip
        assert called.choices[0].message.tool_calls
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="auto", input="a")
        with pytest.raises(openai.NotFoundError):
            ask(client, "hi", model="poetry")


def test_a_second_up_changes_nothing(sim: Deployed) -> None:
    before = sim.processes()
    assert sim.up("--wait", "all").returncode == 0
    assert cli("up", "--run", str(sim.run)).returncode == 0
    assert sim.processes() == before
    refused = sim.verb("up", *sim.overrides, "experts.math.replicas=3", check=False)
    assert refused.returncode == 2
    assert "experts.math.replicas" in refused.stderr


def test_the_verbs_show_what_runs(sim: Deployed) -> None:
    status = sim.status()
    assert {r["state"] for e in status["experts"].values() for r in e["replicas"]} == {"ready"}
    assert "math-1.g" in sim.verb("status").stdout
    assert sim.verb("token").stdout.strip() == sim.token
    assert "math" in sim.verb("route", PROMPTS["math"]).stdout
    explained = json.loads(sim.verb("route", PROMPTS["law"], "--json").stdout)
    assert set(explained) == {*EXPLANATION_KEYS, "replicas"}
    assert explained["expert"] == "law"
    assert sim.verb("chat", "--model", "math", "hello").stdout.strip()
    assert "math-0" in sim.verb("logs", "math").stdout
    assert sim.verb("why").returncode == 0

    def shared() -> set[str]:
        records = json.loads((sim.run / "registry.json").read_text())["records"]
        return {record["replica"].split(".")[0] for record in records}

    eventually_sync(lambda: shared() >= {"router-0", "math-0", "math-1"})


def agent_and_engine(one: Deployed, replica: str) -> tuple[int, int]:
    progress = one.progress(replica)
    return int(progress["pid"]), int(progress["engine_pid"])


async def stream_until(client: openai.AsyncOpenAI, *, model: str, started: asyncio.Event) -> tuple[str, str]:
    """Reads a long stream. Returns its replica and how it ended."""
    async with client.chat.completions.with_streaming_response.create(
        model=model,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=800,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as response:
        replica = response.headers["x-replica"]
        try:
            async for _ in await response.parse():
                started.set()
        except openai.APIError as error:
            return replica, f"error: {error.message}"
    return replica, "complete"


@pytest.mark.parametrize("victim", ["engine", "agent"])
async def test_only_the_killed_replicas_streams_fail_and_capacity_returns(sim: Deployed, victim: str) -> None:
    before = sorted(sim.ready("math"))
    assert len(before) == 2
    target = before[0]
    async with sim.async_client() as client:
        events = [asyncio.Event() for _ in range(8)]
        streams = [asyncio.create_task(stream_until(client, model="math", started=e)) for e in events]
        other = asyncio.create_task(stream_until(client, model="code", started=asyncio.Event()))
        await asyncio.gather(*(e.wait() for e in events))
        agent, engine = agent_and_engine(sim, target)
        kill(engine if victim == "engine" else agent)
        ends = await asyncio.gather(*streams)
        assert (await other)[1] == "complete"
    assert {r for r, _ in ends} == set(before)
    for replica, end in ends:
        assert end.startswith("error:") == (replica == target), (replica, end)
    slot = split_replica(target)[:2]

    def back() -> bool:
        if victim == "engine" and not sim.progress(target)["restarts"]:
            return False  # its agent has not noticed
        ready = sim.ready("math")
        return len(ready) == 2 and slot in [split_replica(r)[:2] for r in ready]

    await asyncio.to_thread(eventually_sync, back)
    if victim == "engine":
        assert sim.progress(target)["restarts"] >= 1
        assert sim.progress(target)["reason"] == "killed"
    await asyncio.to_thread(eventually_sync, lambda: gauges_are_zero(sim))


def test_a_killed_router_is_brought_back_by_up_and_the_experts_stay(sim: Deployed) -> None:
    experts = {r["replica"] for e in sim.status()["experts"].values() for r in e["replicas"]}
    url = sim.url
    record = next(r for r in json.loads((sim.run / "registry.json").read_text())["records"] if r["kind"] == "router")
    kill(int(sim.progress(record["replica"])["pid"]))
    eventually_sync(lambda: sim.up(check=False).returncode == 0)
    assert sim.url == url, "it takes its predecessor's port"
    assert {r["replica"] for e in sim.status()["experts"].values() for r in e["replicas"]} == experts
    eventually_sync(lambda: all(sim.ready(name) for name in PROMPTS), every_s=0.2)  # the new router finds them
    with sim.client() as client:
        assert ask(client, PROMPTS["math"])[1]["x-expert"] == "math"


def unavailable(client: openai.OpenAI, prompt: str) -> dict[str, str] | None:
    """The headers of the response, once the router knows that the prompt's expert has no replica."""
    _, headers = ask(client, prompt)
    return headers if headers["x-route-reason"] == "unavailable" else None


def test_scaling_adds_and_drains(sim: Deployed) -> None:
    sim.verb("scale", "code=2", "law=0")
    eventually_sync(lambda: len(sim.ready("code")) == 2 and not sim.ready("law"))
    with sim.client() as client:
        headers = eventually_sync(lambda: unavailable(client, PROMPTS["law"]))
        assert headers["x-expert"] != "law"
    sim.verb("scale", "code=1", "law=1")
    eventually_sync(lambda: len(sim.ready("code")) == 1 and len(sim.ready("law")) == 1)
    refused = sim.verb("scale", "poetry=1", check=False)
    assert refused.returncode == 2
    assert "poetry" in refused.stderr


def test_an_external_endpoint_joins_and_leaves(sim: Deployed, tmp_path: Path) -> None:
    """The endpoint is another router's expert, registered under a name of its own."""
    token = tmp_path / "token"
    token.write_text(sim.token)
    own = tmp_path / "own"
    sim_url = f"{sim.url}/v1"
    joined = cli(
        "register",
        "--run",
        str(own),
        "--expert",
        "numbers",
        "--url",
        sim_url,
        "--model",
        "math",
        "--token-file",
        str(token),
    )
    assert joined.returncode == 0
    sim.verb("register", "--expert", "numbers", "--url", sim_url, "--model", "math", "--token-file", str(token))
    with sim.client() as client:
        eventually_sync(lambda: "numbers" in [m.id for m in client.models.list()])
        eventually_sync(lambda: sim.ready("numbers"))
        assert ask(client, "hi", model="numbers")[1]["x-expert"] == "numbers"
        sim.verb("unregister", "--expert", "numbers")
        eventually_sync(lambda: "numbers" not in [m.id for m in client.models.list()])


def test_the_clients_bytes_reach_the_engine(sim: Deployed) -> None:
    """Router and agent forward exactly the bytes that were sent, by name and by `auto`."""
    for model in ("math", "auto"):
        template = (
            '{"x_new":  {"a": 1.0e2},"messages":[{"content":"QUESTION \\u00e9 é","role":"user"}],\n "model" : "MODEL" }'
        )
        body = template.replace("QUESTION", PROMPTS["math"]).replace("MODEL", model).encode()
        headers = {"authorization": f"Bearer {sim.token}", "content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{sim.url}/v1/chat/completions", body, headers)) as answer:
            assert answer.headers["x-simulated"] == "true"
        sockets = sim.scratch.glob("*/*/engine.sock")
        assert base64.b64encode(body).decode() in {last for socket in sockets for last in last_bodies(socket)}


def last_bodies(socket_path: Path) -> list[str]:
    """The request bodies that the simulated engine received last, in base64, without the agent's health probes."""

    async def ask() -> list[str]:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket_path))) as session,
            session.get("http://engine/sim/last?n=8") as response,
        ):
            received = (await response.json())["requests"]
        return [str(request["body_base64"]) for request in received]

    return asyncio.run(ask())


def test_after_all_of_it_every_gauge_is_zero(sim: Deployed) -> None:
    eventually_sync(lambda: gauges_are_zero(sim))
    assert all(r["in_flight"] == 0 for e in sim.status()["experts"].values() for r in e["replicas"])
