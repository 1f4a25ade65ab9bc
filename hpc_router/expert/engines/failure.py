"""The cause of an engine's end: exit status and last log lines -> a reason and the log line that shows it.

The tables are data; `classify` is pure. The reason decides whether a restart can help, and `status` and `why` show the
message.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from hpc_router.state.job_records import FailureReason

MESSAGE_LENGTH: Final = 300
CANNOT_RUN: Final = 127
"""The exit status of the guard, as of a shell, if there was no program to run."""


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
"""Log lines of every engine on PyTorch."""

HUB: Final = signs(
    (r"SafetensorError|Error while deserializing header|invalid load key", FailureReason.WEIGHTS),
    (r"does not appear to have (a file|files) named|no file named .*(safetensors|\.bin)", FailureReason.WEIGHTS),
    (r"(Repository|Revision|Entry|LocalEntry)NotFoundError|GatedRepoError|HFValidationError", FailureReason.WEIGHTS),
    (r"not a valid model identifier|[Cc]ould(n't| not) find .*in the cached files", FailureReason.WEIGHTS),
    (r"[Cc]an't load (the configuration|tokenizer|image processor)", FailureReason.WEIGHTS),
    (r"Unrecognized (model|processing class) in|size mismatch for|Repo id must be", FailureReason.WEIGHTS),
)
"""Log lines of transformers and huggingface_hub, which all engines use, about a model that cannot be loaded."""

OPTION: Final = signs(
    (r"error: (unrecognized arguments|argument |the following arguments|ambiguous option)", FailureReason.BAD_OPTION),
    (r"[Nn]o such option|Invalid value for|Missing argument|Got unexpected extra argument", FailureReason.BAD_OPTION),
)
"""Error messages of argparse and click."""

PORT: Final = signs((r"EADDRINUSE|[Aa]ddress already in use", FailureReason.PORT_TAKEN))
"""The port was free when it was chosen; the next start gets another one."""

_BROKEN_INTERPRETER: Final = re.compile(r"No module named|ImportError: |cannot run .*: ")
"""Used for the last relevant line only: failed imports are often caught."""
_RAISED: Final = re.compile(r"^[\w.]*(Error|Exception)\b")
LAST_LINES: Final = 20
"""An exception that is followed by more lines than this was handled and is not the cause of the end."""
_PREFIX: Final = re.compile(r"^(\(\w+ pid=\d+\) )?(\w+ ([\d-]+ [\d:]+ )?\[\S+:\d+\] )?")
"""The prefix of vLLM's log lines: process, level, time, and place in the source."""


def classify(status: int, tail: Sequence[str], table: Iterable[Sign]) -> EngineFailure:
    """The reason of an end: the first sign of the table that matches any line, else the exit status.

    `status` is in a shell's form: 128 + N for signal N. A process that SIGKILL ended could not log anything about it.
    """
    if status == 128 + 9:
        return EngineFailure(FailureReason.KILLED, "killed by signal 9: by hand, or by the kernel for lack of memory")
    for sign in table:
        line = next((line for line in reversed(tail) if sign.pattern.search(line)), None)
        if line is not None:
            return EngineFailure(sign.reason, _shorten(line))
    lines = [_shorten(line) for line in reversed(tail) if line.strip()]
    raised = next((line for line in lines[:LAST_LINES] if _RAISED.search(line)), None)
    last = raised or (lines[0] if lines else "its log is empty")
    if status == CANNOT_RUN or _BROKEN_INTERPRETER.search(last):
        return EngineFailure(FailureReason.INTERPRETER, last)
    if status > 128:
        return EngineFailure(FailureReason.CRASHED, f"ended by signal {status - 128}; last line: {last}")
    return EngineFailure(FailureReason.CRASHED, f"ended with exit status {status}; last line: {last}")


def _shorten(line: str) -> str:
    """The line without the prefix of a log or the frame of a box, cut to MESSAGE_LENGTH."""
    return _PREFIX.sub("", line.strip(" │\t")).strip()[:MESSAGE_LENGTH]
