"""`transformers serve`, started through `serve_transformers.py`, which makes it listen on a unix socket.

It accepts only one model name, `MODEL` or `MODEL@REVISION` as configured, so the router writes that name into the
request. A copy of the model on the node's disk has the same name. The engine's `/v1/models` lists all models in the
hub's cache instead of those that it serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hpc_router.config.schema import ExpertConfig, TransformersOptions
from hpc_router.expert.engines.base import (
    ENGINE_GRACE_S,
    INSIDE,
    Place,
    checked_flags,
    flags,
    interpreter,
    one_node_only,
)
from hpc_router.expert.engines.failure import HUB, OPTION, TORCH, Sign, signs
from hpc_router.state.job_records import FailureReason
from hpc_router.state.registry import EngineInfo

_SERVE: Final = INSIDE / "serve_transformers.py"
_SIGNS: Final = (
    *TORCH,
    *HUB,
    *OPTION,
    *signs((r"Unsupported (dtype|quantization method|attention implementation)", FailureReason.BAD_OPTION)),
)
_RESERVED_FLAGS: Final = {
    "host": "the engine listens on a unix socket",
    "port": "the engine listens on a unix socket",
    "device": "use options.device",
    "dtype": "use options.dtype",
}


@dataclass(frozen=True)
class TransformersEngine:
    """Describes a `transformers serve` engine."""

    expert: str
    config: ExpertConfig
    options: TransformersOptions

    ready_path = "/health"
    lists_models = False
    accepts = None
    packages: Sequence[str] = ("transformers",)
    signs: Sequence[Sign] = _SIGNS
    grace_s = ENGINE_GRACE_S

    @property
    def python(self) -> str:
        return interpreter(self.config.engine)

    @property
    def models(self) -> tuple[str, ...]:
        return (self.config.model,)

    @property
    def _model(self) -> str:
        revision = self.config.revision
        return self.config.model if revision is None else f"{self.config.model}@{revision}"

    def serves(self) -> dict[str, str]:
        return {self.expert: self._model}

    def names(self) -> tuple[str, ...]:
        return (self._model,)

    def info(self) -> EngineInfo:
        quantization = self.options.extra.get("quantization")
        return EngineInfo(
            kind="transformers",
            model=self.config.model,
            revision=self.config.revision,
            quantization=None if quantization is None else str(quantization),
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            priority=False,
            prefix_caching=False,
        )

    def argv(self, place: Place) -> list[str]:
        copy = place.copies.get(self.config.model)
        weights = () if copy is None else ("--weights", copy)
        return [self.python, str(_SERVE), "--uds", str(place.socket), *weights, *self._flags()]

    def check_command(self, place: Place) -> list[str] | None:
        return [self.python, str(_SERVE), "--check", *self._flags()]

    def _flags(self) -> list[str]:
        one_node_only(self.expert, self.config)
        extra = checked_flags(self.options.extra, at=f"experts.{self.expert}.engine.options", reserved=_RESERVED_FLAGS)
        return [self._model, "--device", self.options.device, "--dtype", self.options.dtype, *flags(extra)]

    def drain_flags(self, drain_s: int, *, version: str | None) -> list[str]:
        return []

    def environment(self, place: Place) -> dict[str, str]:
        return {}
