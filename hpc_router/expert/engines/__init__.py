"""The engines: vLLM, `transformers serve`, and a simulated one, behind one small interface."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from hpc_router.config.schema import ExpertConfig, SimOptions, TransformersOptions, VllmOptions, options_of
from hpc_router.expert.engines.base import Engine, Place, Ranks, engine_environment, version_command
from hpc_router.expert.engines.failure import EngineFailure, classify
from hpc_router.expert.engines.sim import SimEngine
from hpc_router.expert.engines.transformers import TransformersEngine
from hpc_router.expert.engines.vllm import VllmEngine

__all__ = [
    "Engine",
    "EngineFailure",
    "Place",
    "Ranks",
    "build_engine",
    "classify",
    "engine_environment",
    "version_command",
]

_NOWHERE: Final = Path("/nowhere")
_NONE: Final[Mapping[str, str]] = MappingProxyType({})


def build_engine(expert: str, config: ExpertConfig, *, adapters: Mapping[str, str] = _NONE) -> Engine:
    """Returns the engine for `expert` and its `adapters` (name -> model). Raises ConfigError for invalid options."""
    options = options_of(expert, config.engine)
    engine: Engine
    match options:
        case VllmOptions():
            engine = VllmEngine(expert, config, options, adapters)
        case TransformersOptions():
            engine = TransformersEngine(expert, config, options)
        case SimOptions():
            engine = SimEngine(expert, config, options, adapters)
    engine.argv(Place(_NOWHERE))  # raises ConfigError for reserved flags
    return engine
