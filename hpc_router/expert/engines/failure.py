"""Finds out why an engine ended, from its exit status and last log lines: a reason, and the log line that shows it.

The reason decides whether a restart can help. The commands `status` and `why` show the log line. The tables are data,
and `classify` is a pure function.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from hpc_router.state.job_records import FailureReason

MESSAGE_LENGTH: Final = 300
CANNOT_RUN: Final = 127
"""Exit status of the guard if the program could not be run. Shells use the same status."""


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """Why an engine ended, and the log line that shows it."""

    reason: FailureReason
    message: str


@dataclass(frozen=True, slots=True)
class Sign:
    """A pattern of a log line, and the reason that such a line shows."""

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
"""Log lines of PyTorch."""

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
"""Error messages of argparse and click about invalid options."""

PORT: Final = signs((r"EADDRINUSE|[Aa]ddress already in use", FailureReason.PORT_TAKEN))
"""Log lines about a port that another process took after it was chosen. The next start gets another port."""

_BROKEN_INTERPRETER: Final = re.compile(r"No module named|ImportError: |cannot run .*: ")
"""Matches log lines about a failed import. Only the last relevant line counts, because programs often handle failed
imports."""
_RAISED: Final = re.compile(r"^[\w.]*(Error|Exception)\b")
LAST_LINES: Final = 20
"""Number of last log lines that are searched for exceptions. If more lines follow an exception, the program has handled
it."""
_PREFIX: Final = re.compile(r"^(\(\w+ pid=\d+\) )?(\w+ ([\d-]+ [\d:]+ )?\[\S+:\d+\] )?")
"""Matches the prefix of vLLM's log lines: process, level, time, and place in the source."""


def classify(status: int, tail: Sequence[str], table: Iterable[Sign]) -> EngineFailure:
    """Returns why an engine ended: the reason of the first sign in `table` that matches any line of `tail`, the end of
    its log; without a match, a reason derived from the exit status `status` (128 + N for signal N). After SIGKILL only
    the status counts, because the process had no time to log the cause."""
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
    """Returns the log line without the prefix of the logger or the frame of a box, cut to MESSAGE_LENGTH characters."""
    return _PREFIX.sub("", line.strip(" │\t")).strip()[:MESSAGE_LENGTH]
