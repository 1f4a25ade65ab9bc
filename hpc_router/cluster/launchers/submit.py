"""Hands claimed jobs to the process that submits them (`cluster.jobs`), and keeps what became of each."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from hpc_router.cluster.launchers.commands import last_words
from hpc_router.errors import LaunchError
from hpc_router.net.job_environment import JOB_ID, current_job_id, without_job_variables
from hpc_router.state.job_records import Exit, FailureReason, JobDir
from hpc_router.state.run_directory import RunDir, private_umask

TIMEOUT_S: Final = 60.0
"""For the batch, and as much again for each job in it: a busy controller takes its time."""
ASKED: Final = "it was asked to end before it was submitted"
_OURS: Final = "the submitting process failed"


def submit_all(batch: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Replica -> what went wrong with it. `batch`: `jobs.Submission` as plain values, because only the child loads
    submitit."""
    replicas = [replica for submission in batch for replica in submission["argv_of"]]
    held = current_job_id()
    try:
        with private_umask():
            done = subprocess.run(
                [sys.executable, "-m", "hpc_router.cluster.launchers.submitit_process"],
                input=json.dumps(batch).encode(),
                env={**without_job_variables(os.environ), **({JOB_ID: held} if held is not None else {})},
                capture_output=True,
                check=True,
                start_new_session=True,
                timeout=TIMEOUT_S * (1 + len(batch)),
            )
        said, otherwise = done.stdout, f"{_OURS}: it said nothing of this job"
    except (OSError, subprocess.SubprocessError) as error:
        said, otherwise = getattr(error, "stdout", None) or b"", f"{_OURS}: {last_words(error)}"
    return {**dict.fromkeys(replicas, otherwise), **_answers(said)}


def _answers(said: bytes) -> dict[str, str | None]:
    """A line for each job; the child may have been stopped in the middle of one."""
    answers: dict[str, str | None] = {}
    for line in said.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        answers |= dict.fromkeys(answer["replicas"], answer["error"])
    return answers


def keep_refusals(run: RunDir, answers: Mapping[str, str | None], explained: Callable[[str, str], Exit]) -> None:
    """An exit record for each job that was not submitted; `explained(replica, said)` makes it, where it was not our own
    fault. Raises LaunchError if there is any."""
    refused: dict[str, Exit] = {}
    for replica, said in answers.items():
        job = JobDir(run, replica)
        if said is None or job.info() is not None:  # submitted, even where the child came to grief afterwards
            continue
        if said == ASKED:
            job.write(Exit(ok=True, reason=FailureReason.DRAINED, message=ASKED))
            continue
        ours = said.startswith(_OURS)
        refused[replica] = Exit(False, FailureReason.UNANSWERED, said) if ours else explained(replica, said)
        job.write(refused[replica])
    if refused:
        each = "; ".join(f"{replica}: {end.message}" for replica, end in refused.items())
        raise LaunchError(f"cannot be submitted: {each}")
