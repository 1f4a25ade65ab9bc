"""Living processes, found by words in their command line or environment."""

import os
from pathlib import Path

from hpc_router.state.job_records import start_ticks


def with_word(*words: str) -> list[int]:
    """Those that hold any of the words, without ourselves and without corpses."""
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
