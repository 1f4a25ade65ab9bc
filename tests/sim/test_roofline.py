"""The roofline against figures computed by hand from its sources, and against general properties."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.config.compose import load_deployment
from hpc_router.config.schema import Precision, Roofline, SimulatedGpu
from hpc_router.errors import ConfigError
from hpc_router.sim import roofline as r
from hpc_router.sim.roofline import GPUS, RooflineEngine, SequenceStep

ONE = [SequenceStep(1, 0)]


def test_parameters_are_those_of_the_models() -> None:
    """8.03 and 70.6 billion, as on the models' cards (without norms)."""
    for name, billions in (("llama3-8b", 8.03), ("llama3-70b", 70.55)):
        shape = r.MODELS[name]
        assert (shape.linear_parameters + 2 * shape.output_parameters) / 1e9 == pytest.approx(billions, abs=0.01)
    assert r.MODELS["llama3-8b"].kv_bytes == 131_072
    assert r.MODELS["llama3-70b"].kv_bytes == 327_680


def test_a_lone_token_costs_the_weights_traffic() -> None:
    """8B in bf16 on one H100: (6.98 + 0.525) billion x 2 bytes over 80 % of 3.35 TB/s."""
    engine = RooflineEngine(Roofline())
    read_s = (6.9793 + 0.5253) * 2e9 / (0.8 * 3.35e12)
    assert engine.step_s(ONE) == pytest.approx(read_s + r.HOST_S, rel=1e-3)


def test_a_long_prompt_costs_arithmetic() -> None:
    """2 operations per parameter and token at 60 % of 989.5 TFLOP/s, plus attention."""
    engine = RooflineEngine(Roofline())
    linear_s = 2 * 6.9793e9 * 8192 / (0.6 * 989.5e12)
    attention_s = 4 * 32 * 4096 * 8192 * 4096 / (0.6 * 989.5e12)
    assert engine.step_s([SequenceStep(8192, 0)]) == pytest.approx(linear_s + attention_s + r.HOST_S, rel=1e-2)


def test_tensor_parallel_ranks_talk() -> None:
    """Two all-reduces per layer, which cost more across nodes."""
    inside = RooflineEngine(Roofline(tensor_parallel_size=8))
    across = RooflineEngine(Roofline(tensor_parallel_size=8, gpus_per_node=4))
    alone = RooflineEngine(Roofline())
    assert across.step_s(ONE) - inside.step_s(ONE) == pytest.approx(64 * 20e-6, rel=0.1)
    assert alone.step_s(ONE) / 8 < inside.step_s(ONE) < alone.step_s(ONE)


@pytest.mark.parametrize(("quantization", "bytes_"), [("bf16", 2.0), ("fp8", 1.0), ("awq", 0.51953125)])
def test_quantised_weights_move_less(quantization: Precision, bytes_: float) -> None:
    engine = RooflineEngine(Roofline(quantization=quantization))
    assert engine.linear_bytes == pytest.approx(6_979_321_856 * bytes_)
    assert engine.kv_tokens >= RooflineEngine(Roofline()).kv_tokens


def test_fp8_computes_twice_as_fast_where_the_card_knows_it() -> None:
    prompt = [SequenceStep(4096, 0)]
    h100 = {q: RooflineEngine(Roofline(quantization=q)).step_s(prompt) for q in ("bf16", "fp8")}
    a100 = {q: RooflineEngine(Roofline(quantization=q, gpu="a100-sxm")).step_s(prompt) for q in ("bf16", "fp8")}
    assert h100["fp8"] < 0.6 * h100["bf16"]
    assert a100["fp8"] == a100["bf16"]


def test_what_does_not_fit_is_refused() -> None:
    """70B in bf16 is 141 GB: two GPUs of 80 GB have no room for contexts, four have."""
    with pytest.raises(ConfigError, match="needs 141 GB for its weights alone, and 2 x h100-sxm have 160 GB"):
        RooflineEngine(Roofline(model="llama3-70b", tensor_parallel_size=2))
    assert RooflineEngine(Roofline(model="llama3-70b", tensor_parallel_size=4)).kv_tokens > 400_000


def test_the_config_knows_every_gpu() -> None:
    assert get_args(SimulatedGpu) == tuple(GPUS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Roofline(gpu="h100"), "did you mean 'h100-sxm'"),  # type: ignore[arg-type]
        (Roofline(quantization="int8"), "valid: awq, bf16, fp8"),  # type: ignore[arg-type]
        (Roofline(model="mixtral"), "nor a folder with config.json"),
        (Roofline(slowdown=0), "must be above 0"),
        (Roofline(tensor_parallel_size=0), "whole numbers from 1"),
    ],
)
def test_refusals(options: Roofline, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RooflineEngine(options)


@given(
    pieces=st.lists(st.builds(SequenceStep, st.integers(1, 512), st.integers(0, 8000)), min_size=1, max_size=64),
    tp=st.sampled_from([1, 2, 4, 8]),
    quantization=st.sampled_from(["bf16", "fp8", "awq"]),
)
def test_more_work_never_takes_less_time(pieces: list[SequenceStep], tp: int, quantization: Precision) -> None:
    engine = RooflineEngine(Roofline(tensor_parallel_size=tp, quantization=quantization))
    whole = engine.step_s(pieces)
    assert whole >= engine.step_s(pieces[:1])
    assert engine.step_s([replace(p, context=p.context + 100) for p in pieces]) >= whole
    assert whole > r.HOST_S


def test_a_topology_is_predicted_by_one_word() -> None:
    """Only the engines and their GPUs change, and no weights are copied."""
    real = load_deployment(["topology=llama3_4x8b_fp8"])
    overrides = ["topology=llama3_4x8b_fp8", "simulate.gpu=h200-sxm", "simulate.slowdown=3"]
    predicted = load_deployment([*overrides, "cluster.stage_to=/local"])
    assert predicted.cluster.stage_to is None  # no weights are loaded
    assert list(predicted.experts) == list(real.experts)
    for expert in predicted.experts.values():
        assert (expert.engine.kind, expert.resources.gpus) == ("sim", 0)
        roofline = expert.engine.options["roofline"]
        assert (roofline["gpu"], roofline["quantization"], roofline["slowdown"]) == ("h200-sxm", "fp8", 3.0)
    assert predicted.policy == real.policy
    with pytest.raises(ConfigError, match="the simulation does not support it"):
        load_deployment(
            ["topology=llama3_4x8b_fp8", "simulate.gpu=l40s", "experts.math.engine.options.quantization=gptq"]
        )
