"""Experts that are LoRA adapters on the engine of another expert, and the checks of their config."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc_router.config.adapters import adapter_rank, adapters_of, host_of, hosts
from hpc_router.config.compose import load_deployment
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, ResourceConfig
from hpc_router.config.validation import check
from hpc_router.errors import ConfigError
from hpc_router.router.replicas.admission import queue_limits
from hpc_router.routing import exemplars

BASE = ExpertConfig(model="m", engine=EngineConfig(kind="sim"))
MATH = ExpertConfig(model="a", adapter_of="base")


def deployment(**experts: ExpertConfig) -> Deployment:
    made = Deployment(experts={"base": BASE, "math": MATH, **experts})
    made.policy.kind = "model_field"
    return made


def refused(**experts: ExpertConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check(deployment(**experts))
    assert "\n" not in str(caught.value)
    assert caught.value.key is not None
    return str(caught.value)


def test_hosts_and_their_adapters() -> None:
    experts = deployment(law=replace(MATH, model="b"), code=BASE).experts
    assert list(hosts(experts)) == ["base", "code"]
    assert [host_of(experts, name) for name in experts] == ["base", "base", "base", "code"]
    assert adapters_of(experts, "base") == {"math": "a", "law": "b"}
    assert adapters_of(experts, "code") == {}


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("bse", "experts.law.adapter_of=bse: no expert is named 'bse'; did you mean 'base'? (valid: base)"),
        ("law", "experts.law.adapter_of=law: an expert cannot be its own adapter (valid: base)"),
        ("math", "experts.law.adapter_of=math: 'math' is an adapter itself (valid: base)"),
        ("slow", "the engine 'transformers' of 'slow' takes no adapters (valid: one with engine.kind vllm or sim)"),
    ],
)
def test_an_adapter_needs_an_engine_that_takes_it(host: str, message: str) -> None:
    slow = ExpertConfig(model="m", engine=EngineConfig(kind="transformers"))
    assert message in refused(slow=slow, law=replace(MATH, adapter_of=host))


@pytest.mark.parametrize(
    "own",
    [
        {"replicas": 2},
        {"revision": "v1"},
        {"capacity": 8},
        {"max_in_flight": 8},
        {"engine": EngineConfig(kind="sim")},
        {"resources": ResourceConfig(gpus=1)},
    ],
    ids=lambda own: next(iter(own)),
)
def test_what_only_its_host_can_have_is_refused(own: dict[str, Any]) -> None:
    (key,) = own
    assert refused(math=replace(MATH, **own)) == (
        f"experts.math.{key}: 'math' is an adapter on the engine of 'base' and has no {key} of its own; "
        f"edit experts.base.{key}, which holds for both"
    )


def test_an_adapter_may_have_a_description_and_exemplars() -> None:
    check(deployment(math=replace(MATH, description="sums", exemplars=["1 + 1"])))


def test_an_override_of_an_adapter_is_named() -> None:
    with pytest.raises(ConfigError, match=r"override 'experts\.math\.replicas=2': experts\.math\.replicas: 'math' is"):
        load_deployment(["topology=sim_lora", "experts.math.replicas=2"])


def test_a_bound_on_an_engine_holds_for_all_that_it_serves() -> None:
    bounds = queue_limits(deployment(base=replace(BASE, max_in_flight=4), code=BASE))
    assert bounds.in_flight == {"base": 4, "math": 4}


def test_adapters_are_taught_like_any_expert() -> None:
    experts = load_deployment(["topology=sim_lora"]).experts
    taught = {name: expert.exemplars for name, expert in experts.items() if expert.exemplars}
    assert set(exemplars.train(taught).experts) == {"math", "law", "medicine"}


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({"r": 8}, 8),
        ({"r": 8, "rank_pattern": None}, 8),
        ({"r": 8, "rank_pattern": {"q_proj": 32, "v_proj": 4}}, 32),
    ],
)
def test_an_adapters_rank_is_its_largest(tmp_path: Path, config: dict[str, Any], rank: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_rank(tmp_path) == rank


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "3", '{"r": "8"}', '{"r": 0}', '{"r": true}', '{"r": 8, "rank_pattern": 3}']
)
def test_a_config_without_a_rank_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"it has no adapter_config\.json"):
        adapter_rank(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="has no rank"):
        adapter_rank(tmp_path)
