"""Finds running processes by text in their command line or environment."""

import os
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
