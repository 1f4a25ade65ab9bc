"""The simulated engine, `python -m hpc_router.sim`, which serves the API without a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from hpc_router.config.schema import ExpertConfig, SimOptions
from hpc_router.errors import ConfigError
from hpc_router.expert.engines.base import (
    ENGINE_GRACE_S,
    AdapterEngine,
    Place,
    checked_flags,
    flag_name,
    flags,
    lora_modules,
    orders_by_priority,
    own_names,
    rank_flags,
    ranks_at,
)
from hpc_router.expert.engines.failure import OPTION, PORT, TORCH, Sign, signs
from hpc_router.net.protocol import MODELS
from hpc_router.sim import roofline
from hpc_router.sim.faults import parse_rules
from hpc_router.state.job_records import FailureReason
from hpc_router.state.registry import EngineInfo

_SIGNS: Final = (
    *PORT,
    *TORCH,
    *signs(
        (r"No available memory for the cache blocks", FailureReason.OUT_OF_MEMORY),
        (r"Cannot find any model weights", FailureReason.WEIGHTS),
        (r"^error: ", FailureReason.BAD_OPTION),
    ),
    *OPTION,
)
_RESERVED_FLAGS: Final = {
    "uds": "the agent chooses the socket",
    "host": "the engine listens on a unix socket",
    "port": "the engine listens on a unix socket",
    "served-model-name": "the expert's name is used",
    "lora-modules": "use experts.<name>.adapter_of",
    "faults": "use options.faults",
    "roofline": "use options.roofline",
    "nnodes": "use experts.<name>.resources.nodes",
    **dict.fromkeys(("node-rank", "master-addr", "master-port"), "the agent of each node sets it"),
}


@dataclass(frozen=True)
class SimEngine(AdapterEngine):
    """Describes a simulated engine."""

    expert: str
    config: ExpertConfig
    options: SimOptions
    adapters: Mapping[str, str] = field(default_factory=dict)

    ready_path = MODELS
    lists_models = True
    accepts = ("text", "tools", "embeddings")
    packages: Sequence[str] = ("hpc-router",)
    signs: Sequence[Sign] = _SIGNS
    grace_s = ENGINE_GRACE_S

    def info(self) -> EngineInfo:
        roofline_options = self.options.roofline
        return EngineInfo(
            kind="sim",
            model=self.config.model,
            revision=self.config.revision,
            quantization=None if roofline_options is None else roofline_options.quantization,
            tensor_parallel_size=None if roofline_options is None else roofline_options.tensor_parallel_size,
            pipeline_parallel_size=None if roofline_options is None else roofline_options.pipeline_parallel_size,
            priority=orders_by_priority(self.options.extra),
        )

    def argv(self, place: Place) -> list[str]:
        options, key = self.options, f"experts.{self.expert}.engine.options"
        extra = checked_flags(options.extra, at=key, reserved=_RESERVED_FLAGS)
        faults = ["--faults", json.dumps(options.faults)] if options.faults else []
        try:
            parse_rules(options.faults)
            if options.roofline is not None:
                roofline.RooflineEngine(options.roofline)  # raises ConfigError if the model is unknown or does not fit
        except ConfigError as error:
            raise ConfigError(f"{key}.{error}", key=key) from error
        ranks = ranks_at(place, nodes=self.config.resources.nodes)
        if ranks is not None and ranks.rank > 0:
            return [self.python, "-m", "hpc_router.sim", *rank_flags(ranks)]
        return [
            *(self.python, "-m", "hpc_router.sim"),
            *rank_flags(ranks),
            *("--uds", str(place.socket)),
            *("--served-model-name", *own_names(self.expert, self.adapters)),
            *lora_modules(self.adapters, place),
            *("--seed", str(options.seed)),
            *("--ttft-ms", f"{options.ttft_ms:g}"),
            *("--itl-ms", f"{options.itl_ms:g}"),
            *("--load-s", f"{options.load_s:g}"),
            *(("--roofline", json.dumps(asdict(options.roofline))) if options.roofline is not None else ()),
            *faults,
            *flags(extra),
        ]

    def drain_flags(self, drain_s: int, *, version: str | None) -> list[str]:
        named = map(flag_name, self.options.extra)
        return [] if "drain-s" in named else ["--drain-s", str(drain_s)]

    def environment(self, place: Place) -> dict[str, str]:
        return {}

    def check_command(self, place: Place) -> list[str] | None:
        """Returns a command that checks the flags in `extra`; None if it is empty, as the schema checks all else."""
        return [*self.argv(place), "--check"] if self.options.extra else None
