"""Predicts the duration of one step of continuous batching on given GPUs, with a small roofline model.

A step computes some tokens of some sequences. It takes as long as the slower of arithmetic and memory traffic
(Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009), plus the communication between tensor-parallel ranks,
plus the work of the host. Every constant names its source, or is marked ASSUMED. docs/simulation.md has the formulas.
The result is a prediction and must never be reported as a measurement.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.config.schema import Roofline
from hpc_router.errors import ConfigError, suggest

GB: Final = 1e9
TERA: Final = 1e12


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak values from a GPU's data sheet. The arithmetic is that of dense matrices (half of the value "with
    sparsity"). `link`: bandwidth in one direction.

    `fp8_flops`: None if the tensor cores do not support FP8. `seqs`, `tokens`: defaults of `--max-num-seqs` and
    `--max-num-batched-tokens` in vLLM 0.32's API server on such a GPU (vllm/engine/arg_utils.py).
    """

    memory_gb: float
    bandwidth: float  # bytes/s
    bf16_flops: float
    fp8_flops: float | None
    link: float  # bytes/s
    seqs: int
    tokens: int


GPUS: Final[Mapping[str, Gpu]] = {
    # NVIDIA H100 Tensor Core GPU data sheet (SXM5): 80 GB, 3.35 TB/s, 1,979 TFLOPS BF16 and 3,958 FP8 with sparsity,
    # NVLink 900 GB/s both ways.
    "h100-sxm": Gpu(80, 3.35 * TERA, 989.5 * TERA, 1979 * TERA, 450 * GB, 1024, 8192),
    # NVIDIA H200 data sheet (SXM): the same arithmetic, 141 GB, 4.8 TB/s.
    "h200-sxm": Gpu(141, 4.8 * TERA, 989.5 * TERA, 1979 * TERA, 450 * GB, 1024, 8192),
    # NVIDIA A100 80GB data sheet (SXM4): 2,039 GB/s, 312 TFLOPS BF16 (dense), NVLink 600 GB/s both ways.
    "a100-sxm": Gpu(80, 2.039 * TERA, 312 * TERA, None, 300 * GB, 256, 2048),
    # NVIDIA L40S data sheet: 48 GB, 864 GB/s, 362 TFLOPS BF16 and 733 FP8 (dense), PCIe 4 x16: 32 GB/s each way.
    "l40s": Gpu(48, 864 * GB, 362 * TERA, 733 * TERA, 32 * GB, 256, 2048),
}

MEMORY_EFFICIENCY: Final = 0.8
"""Usable share of the peak memory bandwidth. Measured on an H100 SXM: 2.6 to 2.8 of 3.35 TB/s for weights, 78 to 84 %
(mikamirai.com/blog/gpu-memory-bandwidth, March 2026)."""
COMPUTE_EFFICIENCY: Final = 0.6
"""Usable share of the peak arithmetic. ASSUMED for whole layers; the best single kernels reach about 75 %
(FlashAttention-3, arXiv 2407.08608)."""
LINK_EFFICIENCY: Final = 0.77
"""Usable share of one direction of the link for all-reduces of large messages, as measured on 4 H100 with NCCL
(waynehacking8.github.io/blog/nccl-nvlink-bandwidth, May 2026)."""
HOP_S: Final = 10e-6
"""Minimum seconds of one all-reduce inside a node. ASSUMED: NCCL's minimum for small messages is of that order."""
FABRIC_HOP_S: Final = 30e-6
"""Minimum seconds of one all-reduce between nodes. ASSUMED."""
FABRIC: Final = 50 * GB
"""Bytes/s per GPU of one direction between nodes: an NDR InfiniBand port of 400 Gb/s (NVIDIA ConnectX-7)."""
HOST_S: Final = 1e-3
"""Seconds per step for scheduling, launching and sampling. ASSUMED."""
MEMORY_USED: Final = 0.92
"""Share of GPU memory that vLLM uses: 0.32's default of `gpu_memory_utilization` (vllm/config/cache.py)."""
ACTIVATIONS_GB: Final = 4.0
"""Memory per GPU for activations and CUDA graphs, in GB. ASSUMED."""
BLOCK: Final = 16
"""Tokens per block of the KV cache: vLLM's default (PagedAttention, arXiv 2309.06180)."""

WEIGHT_BYTES: Final[Mapping[str, float]] = {
    "bf16": 2.0,
    "fp8": 1.0,
    # AWQ (arXiv 2306.00978): 4 bits, and per group of 128 weights a scale of 16 bits and a zero of 4.
    "awq": (4 + (16 + 4) / 128) / 8,
}
"""Bytes per parameter of the linear layers. Embeddings and the output layer are always bf16."""


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """The shape of a dense transformer like Llama, as given by its config.json."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def linear_parameters(self) -> int:
        """Returns the number of parameters per layer, in the matrices for query, key, value and output, and in the
        three of the gated feed-forward network."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def output_parameters(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def kv_bytes(self) -> int:
        """Returns the bytes of the KV cache per token of context: keys and values of every layer, two bytes each."""
        return 2 * self.layers * self.kv_heads * self.head * 2


MODELS: Final[Mapping[str, TransformerShape]] = {
    # config.json of meta-llama/Meta-Llama-3-8B and -70B; "The Llama 3 Herd of Models", arXiv 2407.21783, table 3.
    "llama3-8b": TransformerShape(32, 4096, 32, 8, 14336, 128256),
    "llama3-70b": TransformerShape(80, 8192, 64, 8, 28672, 128256),
}


def shape_of(model: str) -> TransformerShape:
    """Returns the shape of a known model, or of a model folder by its config.json. Raises ConfigError."""
    name = model if model in MODELS else _model_name(model)
    if name is not None:
        return MODELS[name]
    path = Path(model) / "config.json"
    if not path.is_file():
        valid = f"{suggest(model, MODELS)}, nor a folder with config.json"
        raise ConfigError(f"roofline.model={model}: no such model{valid}")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    try:
        heads = int(config["num_attention_heads"])
        return TransformerShape(
            int(config["num_hidden_layers"]),
            int(config["hidden_size"]),
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config["intermediate_size"]),
            int(config["vocab_size"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a transformer like Llama: {error}") from error


def _model_name(model: str) -> str | None:
    """Returns the name in MODELS for a hub id such as `meta-llama/Meta-Llama-3-8B-Instruct`; None for an unknown
    model."""
    plain = model.lower().replace("-", "").replace("_", "").replace(".", "")
    for name in MODELS:
        family, _, size = name.partition("-")
        if family in plain and size in plain and not Path(model).is_dir():
            return name
    return None


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """What one sequence computes in a step: `new` tokens, which follow `context` tokens."""

    new: int
    context: int


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a whole batch computes in a step: `new` tokens of `sequences` sequences, which follow `context` tokens in
    all. `pairs`: pairs of a new token and a token of its context; the new tokens of a sequence count by half among
    themselves."""

    sequences: int
    new: int
    context: int
    pairs: float


class RooflineEngine:
    """Predicts step durations for one replica: a model in one precision on a number of GPUs. Raises ConfigError if the
    model does not fit."""

    def __init__(self, options: Roofline) -> None:
        if options.gpu not in GPUS:
            raise ConfigError(f"roofline.gpu={options.gpu}: not known{suggest(options.gpu, GPUS)}")
        if options.quantization not in WEIGHT_BYTES:
            valid = suggest(options.quantization, WEIGHT_BYTES)
            raise ConfigError(f"roofline.quantization={options.quantization}: not known{valid}")
        if options.tensor_parallel_size < 1 or options.pipeline_parallel_size < 1 or options.gpus_per_node < 1:
            raise ConfigError("roofline: parallel sizes and gpus_per_node are whole numbers from 1")
        if not options.slowdown > 0:
            raise ConfigError(f"roofline.slowdown={options.slowdown}: must be above 0")
        self.options, self.gpu, self.shape = options, GPUS[options.gpu], shape_of(options.model)
        self.tp, self.pp = options.tensor_parallel_size, options.pipeline_parallel_size
        self.linear_bytes = self.shape.linear_parameters * WEIGHT_BYTES[options.quantization]
        self.output_bytes = self.shape.output_parameters * 2.0
        self.max_seqs = options.max_num_seqs or self.gpu.seqs
        self.max_tokens = options.max_num_batched_tokens or self.gpu.tokens
        self.kv_tokens = self._kv_tokens()

    def _kv_tokens(self) -> int:
        """Returns the number of context tokens that fit into the GPUs' memory beside the weights. The embedding and the
        output layer take memory once, not once per GPU."""
        gpus = self.tp * self.pp
        weights = self.linear_bytes + 2 * self.output_bytes
        free = gpus * (self.gpu.memory_gb * GB * MEMORY_USED - ACTIVATIONS_GB * GB) - weights
        tokens = int(free / self.shape.kv_bytes) // BLOCK * BLOCK
        if tokens < BLOCK:
            raise ConfigError(
                f"roofline: {self.options.model} in {self.options.quantization} needs {weights / GB:.0f} GB for its "
                f"weights alone, and {gpus} x {self.options.gpu} have {gpus * self.gpu.memory_gb:.0f} GB"
            )
        return tokens

    def step_s(self, steps: Sequence[SequenceStep]) -> float:
        """Returns the duration of one step in seconds, given what each sequence computes."""
        new = sum(step.new for step in steps)
        pairs = sum(step.new * (step.context + step.new / 2) for step in steps)
        return self.work_s(StepWork(len(steps), new, sum(step.context for step in steps), pairs))

    def work_s(self, work: StepWork) -> float:
        """Returns the duration of one step in seconds, given what the whole batch computes. The batch is cut into as
        many parts as there are pipeline stages, and the parts pass through the stages one after the other. Each part
        reads all weights once, and its share of the contexts."""
        new = work.new / self.pp
        reached = (work.context + work.new) / self.pp
        return max(self._arithmetic_s(work, new), self._memory_s(reached)) + self._communication_s(new) + HOST_S

    def _arithmetic_s(self, work: StepWork, new: float) -> float:
        """Returns the seconds of arithmetic in one step. `new`: number of new tokens, all of which pass the layers; one
        token per sequence passes the output layer.

        A token needs 2 operations per parameter (Kaplan et al., arXiv 2001.08361), and for attention 4 operations per
        layer and hidden dimension for each token of its context.
        """
        shape = self.shape
        peak = self.gpu.bf16_flops
        if self.options.quantization == "fp8" and self.gpu.fp8_flops is not None:
            peak_linear = self.gpu.fp8_flops
        else:
            peak_linear = peak
        linear = 2 * shape.linear_parameters * new
        pairs = work.pairs / self.pp
        rest = 4 * shape.layers * shape.hidden * pairs + 2 * shape.output_parameters * work.sequences / self.pp
        return (linear / peak_linear + rest / peak) / (self.tp * COMPUTE_EFFICIENCY)

    def _memory_s(self, reached: float) -> float:
        """Returns the seconds of memory traffic in one step: all weights are read once, and so are the keys and values
        of all contexts, which have `reached` tokens in all (Pope et al., arXiv 2211.05102)."""
        moved = self.linear_bytes + self.output_bytes + reached * self.shape.kv_bytes
        return moved / (self.tp * self.gpu.bandwidth * MEMORY_EFFICIENCY)

    def _communication_s(self, new: float) -> float:
        """Returns the seconds of communication for `new` new tokens: two all-reduces of the hidden state per layer
        (Megatron-LM, arXiv 1909.08053), each moving 2(n-1)/n of its bytes over the slowest link (ring; Patarasuk and
        Yuan, JPDC 69(2), 2009), and one transfer of the hidden state per pipeline stage."""
        message = new * self.shape.hidden * 2
        inside = self.tp <= self.options.gpus_per_node
        link, hop_s = (self.gpu.link, HOP_S) if inside else (min(FABRIC, self.gpu.link), FABRIC_HOP_S)
        communication_s = 0.0
        if self.tp > 1:
            once_s = 2 * (self.tp - 1) / self.tp * message / (link * LINK_EFFICIENCY) + hop_s
            communication_s += 2 * self.shape.layers * once_s
        if self.pp > 1:
            across = self.tp * self.pp > self.options.gpus_per_node
            between, hop_s = (FABRIC, FABRIC_HOP_S) if across else (self.gpu.link, HOP_S)
            communication_s += (self.pp - 1) * (message / (min(between, self.gpu.link) * LINK_EFFICIENCY) + hop_s)
        return communication_s
