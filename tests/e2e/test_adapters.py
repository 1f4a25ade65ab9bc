"""LoRA experts: one engine and one record serve several names. Simulated here; with vLLM in `test_engines`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.deployment import Deployed, deployed
from tests.e2e.support import FAST, PROMPTS, ask, gauges_are_zero
from tests.support.needs import ROOT
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e

ADAPTERS = ("math", "law", "medicine")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with deployed(tmp_path_factory.mktemp("lora"), "topology=sim_lora", FAST, "cluster.beat_s=0.5") as made:
        yield made


def test_each_expert_answers_as_itself(one: Deployed) -> None:
    """Experts are chosen by name, and by the policy. A prompt of no domain goes to the base model."""
    with one.client() as client:
        assert {m.id for m in client.models.list()} == {"auto", "base", *ADAPTERS}
        said = {name: ask(client, "hi", model=name) for name in ("base", *ADAPTERS)}
        assert {headers["x-expert"] for _, headers in said.values()} == set(said)
        assert {headers["x-replica"].partition("-")[0] for _, headers in said.values()} == {"base"}
        assert all(text.startswith(name) for name, (text, _) in said.items()), "the engine knows which one is meant"
        for expert in ADAPTERS:
            text, headers = ask(client, PROMPTS[expert])
            assert (headers["x-expert"], headers["x-route-reason"]) == (expert, "classified")
            assert text.startswith(expert)
        text, headers = ask(client, "ωψξ ζηθ")
        assert (headers["x-expert"], headers["x-route-reason"]) == ("base", "no_known_terms")
        assert text.startswith("base")


def test_one_record_serves_all_experts(one: Deployed) -> None:
    shared: list[dict[str, Any]] = json.loads((one.run / "registry.json").read_text())["records"]
    engines = {r["replica"]: r["serves"] for r in shared if r["kind"] == "expert"}
    every = {name: name for name in ("base", *ADAPTERS)}
    assert engines == {"base-0.g1": every, "base-1.g1": every}


def test_the_verbs_know_the_host_of_an_adapter(one: Deployed) -> None:
    told = one.status()["experts"]
    for name in ("base", *ADAPTERS):
        assert [r["replica"] for r in told[name]["replicas"]] == ["base-0.g1", "base-1.g1"]
        assert (told[name]["wanted"], told[name]["ready"]) == (2, 2)
    assert (told["base"]["adapter_of"], told["math"]["adapter_of"]) == (None, "base")
    assert one.verb("why", "math").returncode == 0
    assert "base-0.g1 | " in one.verb("logs", "math").stdout
    for words, said in ((("scale", "math=3"), "base=3"), (("drain", "math"), "drain base")):
        refused = one.verb(*words, check=False)
        assert refused.returncode == 2
        assert said in refused.stderr


def test_each_expert_of_a_replica_is_measured_without_the_router(one: Deployed, tmp_path: Any) -> None:
    words = ("bench.users=[16]", "bench.duration_s=1", "bench.warmup_s=0.2", "bench.max_tokens=2", "bench.direct=true")
    subprocess.run(
        [sys.executable, "-m", "launch.bench", f"run={one.run}", f"bench.output={tmp_path}", *words],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (path,) = tmp_path.glob("*.jsonl")
    (point,) = (json.loads(line) for line in path.read_text().splitlines())
    assert point["notes"] == []
    assert set(point["direct"]["experts"]) >= set(ADAPTERS)
    assert point["router"]["ttft_s"]["added_s"] is not None


def test_the_engines_of_all_are_scaled(one: Deployed) -> None:
    one.verb("scale", "base=1")
    eventually_sync(lambda: one.ready("math") == ["base-0.g1"])
    with one.client() as client:
        assert ask(client, PROMPTS["math"])[1]["x-expert"] == "math"
    eventually_sync(lambda: gauges_are_zero(one))
