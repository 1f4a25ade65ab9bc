"""Slurm's commands as child processes: without another job's variables, with a time limit, and what they complained."""

import os
import subprocess
from collections.abc import Mapping, Sequence

from hpc_router.net.job_environment import without_job_variables


def output_of(argv: Sequence[str], *, timeout_s: float, also: Mapping[str, str] | None = None) -> str:
    """What it printed. Raises OSError or SubprocessError; `last_words` tells what was said then."""
    done = subprocess.run(
        list(argv),
        env={**without_job_variables(os.environ), **(also or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
    )
    return done.stdout


def last_words(error: OSError | subprocess.SubprocessError | ValueError) -> str:
    """The last line of its complaint; a command that was stopped has bytes where others have text."""
    said = getattr(error, "stderr", None) or ""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    return text.strip().rpartition("\n")[2] or str(error)
