"""`simulate.gpu=h100-sxm`: the same deployment without GPUs, each vLLM engine replaced by a simulated one that stands
for it on such GPUs. So a topology is written once, and predicted or measured by one word."""

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


def simulated(deployment: Deployment) -> Deployment:
    """Raises ConfigError for what the roofline does not know."""
    how = deployment.simulate
    if how.gpu is None:
        return deployment
    experts = {name: _expert(name, config, how) for name, config in deployment.experts.items()}
    return replace(deployment, experts=experts)


def _expert(name: str, config: ExpertConfig, how: Simulate) -> ExpertConfig:
    options = options_of(name, config.engine)
    if config.adapter_of is not None or not isinstance(options, VllmOptions):
        return config
    if options.quantization not in PRECISION:
        key = f"experts.{name}.engine.options.quantization"
        valid = ", ".join(str(known) for known in PRECISION)
        raise ConfigError(f"{key}={options.quantization}: the roofline does not know it (valid: {valid})", key=key)
    assert how.gpu is not None
    roofline = Roofline(
        model=config.model,
        gpu=how.gpu,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        quantization=PRECISION[options.quantization],
        gpus_per_node=max(1, config.resources.gpus),
        slowdown=how.slowdown,
    )
    return replace(
        config,
        engine=EngineConfig(kind="sim", options={"roofline": asdict(roofline)}),
        resources=ResourceConfig(),
    )
