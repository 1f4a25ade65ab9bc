"""What an engine's end means: exit status and last log lines -> a reason and the line that says so.

The tables are data; `classify` is pure. The agent decides by the reason whether a restart can help, and people read
the message in `status` and `why`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from hpc_router.state.job_records import FailureReason

MESSAGE_LENGTH: Final = 300
CANNOT_RUN: Final = 127
"""The guard's own exit status when there was no program to run; a shell's as well."""


@dataclass(frozen=True, slots=True)
class EngineFailure:
    reason: FailureReason
    message: str


@dataclass(frozen=True, slots=True)
class Sign:
    """A log line that matches `pattern` means `reason`."""

    pattern: re.Pattern[str]
    reason: FailureReason


def signs(*table: tuple[str, FailureReason]) -> tuple[Sign, ...]:
    return tuple(Sign(re.compile(pattern), reason) for pattern, reason in table)


TORCH: Final = signs(
    (r"OutOfMemoryError|CUDA out of memory|HIP out of memory", FailureReason.OUT_OF_MEMORY),
    (r"std::bad_alloc|DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory", FailureReason.OUT_OF_MEMORY),
    (r"No CUDA GPUs are available|no NVIDIA driver|CUDA driver version is insufficient", FailureReason.CUDA),
    (r"CUDA error|AcceleratorError|NCCL error|ncclUnhandledCudaError|CUBLAS_STATUS|cuDNN error", FailureReason.CUDA),
    (r"Torch not compiled with CUDA enabled|libcuda\.so|Failed to infer device type", FailureReason.CUDA),
)
"""What every engine on PyTorch says."""

HUB: Final = signs(
    (r"SafetensorError|Error while deserializing header|invalid load key", FailureReason.WEIGHTS),
    (r"does not appear to have (a file|files) named|no file named .*(safetensors|\.bin)", FailureReason.WEIGHTS),
    (r"(Repository|Revision|Entry|LocalEntry)NotFoundError|GatedRepoError|HFValidationError", FailureReason.WEIGHTS),
    (r"not a valid model identifier|[Cc]ould(n't| not) find .*in the cached files", FailureReason.WEIGHTS),
    (r"[Cc]an't load (the configuration|tokenizer|image processor)", FailureReason.WEIGHTS),
    (r"Unrecognized (model|processing class) in|size mismatch for|Repo id must be", FailureReason.WEIGHTS),
)
"""What transformers and huggingface_hub, on which every engine here rests, say about a model they cannot load."""

OPTION: Final = signs(
    (r"error: (unrecognized arguments|argument |the following arguments|ambiguous option)", FailureReason.BAD_OPTION),
    (r"[Nn]o such option|Invalid value for|Missing argument|Got unexpected extra argument", FailureReason.BAD_OPTION),
)
"""argparse's and click's refusals."""

PORT: Final = signs((r"EADDRINUSE|[Aa]ddress already in use", FailureReason.PORT_TAKEN))
"""A port that was free when it was chosen; the next start has another."""

_BROKEN_INTERPRETER: Final = re.compile(r"No module named|ImportError: |cannot run .*: ")
"""Only in the last line that counts: imports that fail are often tried and survived."""
_RAISED: Final = re.compile(r"^[\w.]*(Error|Exception)\b")
LAST_LINES: Final = 20
"""An exception that more lines follow was survived: it is not the cause of the end."""
_PREFIX: Final = re.compile(r"^(\(\w+ pid=\d+\) )?(\w+ ([\d-]+ [\d:]+ )?\[\S+:\d+\] )?")
"""What vLLM puts before a line: the process, level and time, the place in the source."""


def classify(status: int, tail: Sequence[str], table: Iterable[Sign]) -> EngineFailure:
    """The reason of an end: the first sign of the table that any line shows, else the exit status.

    `status` is a shell's: 128 + N for signal N. Who was killed by SIGKILL could say nothing about it.
    """
    if status == 128 + 9:
        return EngineFailure(FailureReason.KILLED, "killed by signal 9: by hand, or by the kernel for lack of memory")
    for sign in table:
        line = next((line for line in reversed(tail) if sign.pattern.search(line)), None)
        if line is not None:
            return EngineFailure(sign.reason, _shorten(line))
    said = [_shorten(line) for line in reversed(tail) if line.strip()]
    raised = next((line for line in said[:LAST_LINES] if _RAISED.search(line)), None)
    last = raised or (said[0] if said else "its log is empty")
    if status == CANNOT_RUN or _BROKEN_INTERPRETER.search(last):
        return EngineFailure(FailureReason.INTERPRETER, last)
    if status > 128:
        return EngineFailure(FailureReason.CRASHED, f"ended by signal {status - 128}; last line: {last}")
    return EngineFailure(FailureReason.CRASHED, f"ended with exit status {status}; last line: {last}")


def _shorten(line: str) -> str:
    """Without what a log or a box puts around it, and not longer than a terminal shows."""
    return _PREFIX.sub("", line.strip(" │\t")).strip()[:MESSAGE_LENGTH]
