"""Running processes: found by text in their command line or environment, and how they handle signals."""

import os
import signal
from pathlib import Path

from hpc_router.state.job_records import start_ticks


def with_word(*words: str) -> list[int]:
    """Ids of the processes with any of the words, without this process and without zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid() or start_ticks(int(entry.name)) is None:
            continue
        try:
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if any(word.encode() in text for word in words):
            found.append(int(entry.name))
    return sorted(found)


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    return _has(pid, "SigCgt", number)


def ignores(pid: int, number: signal.Signals) -> bool:
    return _has(pid, "SigIgn", number)


def _has(pid: int, mask: str, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = next(int(line.split()[1], 16) for line in lines if line.startswith(mask))
    return bool(found >> (number - 1) & 1)
