"""Predicts a deployment without GPUs (`simulate.gpu=h100-sxm`): each vLLM engine is replaced by a simulated engine,
whose latencies are those predicted for the chosen GPU. So the same topology can be predicted and measured."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Final

from hpc_router.config.schema import (
    Deployment,
    EngineConfig,
    ExpertConfig,
    Precision,
    ResourceConfig,
    Roofline,
    Simulate,
    VllmOptions,
    options_of,
)
from hpc_router.errors import ConfigError

PRECISION: Final[Mapping[str | None, Precision]] = {None: "bf16", "fp8": "fp8", "awq": "awq", "awq_marlin": "awq"}
"""vLLM's quantization method -> precision of the simulated weights."""
KEPT_FLAGS: Final = frozenset(
    {
        *("enable-prefix-caching", "no-enable-prefix-caching", "block-size", "num-gpu-blocks-override"),
        "enable-prompt-tokens-details",
    }
)
"""Flags of vLLM that the simulated engine has under the same names."""


def simulated(deployment: Deployment) -> Deployment:
    """Returns the deployment with vLLM engines replaced by simulated ones if `simulate.gpu` is set, else unchanged.
    Raises ConfigError for a quantization that the simulation does not know."""
    options = deployment.simulate
    if options.gpu is None:
        return deployment
    experts = {name: _expert(name, config, options) for name, config in deployment.experts.items()}
    cluster = replace(deployment.cluster, stage_to=None)  # a simulated engine loads no weights
    return replace(deployment, experts=experts, cluster=cluster)


def _expert(name: str, config: ExpertConfig, simulate: Simulate) -> ExpertConfig:
    options = options_of(name, config.engine)
    if config.adapter_of is not None or not isinstance(options, VllmOptions):
        return config
    if options.quantization not in PRECISION:
        key = f"experts.{name}.engine.options.quantization"
        valid = ", ".join(str(known) for known in PRECISION)
        raise ConfigError(f"{key}={options.quantization}: the simulation does not support it (valid: {valid})", key=key)
    assert simulate.gpu is not None
    roofline = Roofline(
        model=config.model,
        gpu=simulate.gpu,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        quantization=PRECISION[options.quantization],
        gpus_per_node=max(1, config.resources.gpus),
        slowdown=simulate.slowdown,
    )
    kept = {name: value for name, value in options.extra.items() if name.lstrip("-").replace("_", "-") in KEPT_FLAGS}
    return replace(
        config,
        engine=EngineConfig(kind="sim", options={"roofline": asdict(roofline), **({"extra": kept} if kept else {})}),
        resources=ResourceConfig(),
    )
