"""Runs Slurm's commands: one function with a time limit and one kind of error.

Variables of another Slurm job are removed from the environment, because commands take options from them.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence

from hpc_router.errors import LaunchError
from hpc_router.net.job_environment import without_job_variables


class SlurmCommandError(LaunchError):
    """A command of Slurm failed. `output`: what the command printed before it ended with a status other than 0; None if
    it could not be started or did not finish in time."""

    def __init__(self, message: str, *, output: str | None = None) -> None:
        super().__init__(message)
        self.output = output


def run_slurm_command(
    argv: Sequence[str], *, timeout_s: float, stdin: str = "", environment: Mapping[str, str] | None = None
) -> str:
    """Runs a command of Slurm and returns its stdout. `stdin`: its input. `environment`: variables to add to this
    process's own. Raises SlurmCommandError."""
    try:
        done = subprocess.run(
            list(argv),
            env={**without_job_variables(os.environ), **(environment or {})},
            input=stdin,
            capture_output=True,
            check=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except FileNotFoundError as error:
        raise SlurmCommandError(f"{argv[0]} is not installed here") from error
    except subprocess.TimeoutExpired as error:
        detail = f": {last_error_line(error)}" if error.stderr else ""
        raise SlurmCommandError(f"{argv[0]} gave no answer within {error.timeout:g} s{detail}") from error
    except subprocess.CalledProcessError as error:
        output = error.stderr or error.stdout or f"exit status {error.returncode}"
        raise SlurmCommandError(last_error_line(error), output=output) from error
    except OSError as error:
        raise SlurmCommandError(str(error)) from error
    return done.stdout


def last_error_line(error: OSError | subprocess.SubprocessError) -> str:
    """Returns the last line that the failed command wrote to stderr; if it wrote none, the error as text."""
    stderr = getattr(error, "stderr", None) or ""
    text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr  # bytes after a timeout
    return text.strip().rpartition("\n")[2] or str(error)
