"""The settings of a simulated engine, with all defaults, for the command line and for tests."""

from dataclasses import dataclass
from typing import Final, Literal

from hpc_router.config.schema import Roofline
from hpc_router.errors import ConfigError
from hpc_router.sim.faults import Rule
from hpc_router.sim.roofline import BLOCK, RooflineEngine

KV_TOKENS: Final = 524_288
"""Tokens in the KV cache without a roofline: about those of Llama 3 8B on one GPU of 80 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """The settings of one simulated engine."""

    served_model_names: tuple[str, ...] = ("sim",)
    adapters: tuple[str, ...] = ()  # further model names, answered as other models at the same speed
    seed: int = 0
    ttft_s: float = 0.020
    itl_s: float = 0.005
    jitter: float = 0.1
    load_s: float = 0.0
    # vLLM does not listen before it has loaded. True: listen at once, and answer 503 until then.
    listen_while_loading: bool = False
    capacity: int | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"  # order of requests that wait, as in vLLM
    max_tokens_default: int = 16  # mean length of an answer that ends by itself
    max_model_len: int = 131_072
    enable_prefix_caching: bool = True  # vLLM's default for models that generate text
    block_size: int = BLOCK  # tokens per block of the KV cache
    # Blocks of the KV cache; None: what fits beside the roofline's model, or else KV_TOKENS. As in vLLM, one is unused.
    num_gpu_blocks_override: int | None = None
    enable_prompt_tokens_details: bool = False  # say in `usage` how many prompt tokens were cached
    embedding_dimensions: int = 64
    keepalive_s: float = 75.0
    # Seconds for which running requests may finish after SIGTERM; 0 ends them at once with `abort`.
    drain_s: float = 0.0
    faults: tuple[Rule, ...] = ()
    # The GPU engine whose latencies are predicted; ttft_s, itl_s and jitter are then not used.
    roofline: Roofline | None = None

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("served_model_names: at least one name, none of them empty")
        if len(set(self.names)) < len(self.names) or not all(self.adapters):
            raise ConfigError("adapters: each needs a name that nothing else has")
        for name in ("ttft_s", "itl_s", "jitter", "load_s", "keepalive_s", "drain_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: {getattr(self, name)} is not a finite number of 0 or more")
        for name in ("capacity", "max_tokens_default", "max_model_len", "embedding_dimensions", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is less than 1")
        if self.num_gpu_blocks_override is not None and self.num_gpu_blocks_override < 3:
            raise ConfigError(f"num_gpu_blocks_override: {self.num_gpu_blocks_override} is less than 3")

    @property
    def model(self) -> str:
        """Returns the first served model name. As in vLLM, responses have it even if the request uses another name."""
        return self.served_model_names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Returns all model names that requests may use."""
        return (*self.served_model_names, *self.adapters)

    def answering(self, asked: str | None) -> str:
        """Returns the model name in the response to a request that names `asked`: `asked` if it is an adapter, else
        `model`."""
        return asked if asked in self.adapters else self.model


def kv_blocks(config: SimConfig, roofline: RooflineEngine | None) -> int:
    """Returns the number of blocks of the engine's KV cache."""
    if config.num_gpu_blocks_override is not None:
        return max(2, config.num_gpu_blocks_override - 1)  # vLLM's first block is a placeholder
    return max(2, (KV_TOKENS if roofline is None else roofline.kv_tokens) // config.block_size)
