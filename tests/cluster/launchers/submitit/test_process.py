"""A submitted job holds a function by its name and plain values, so that no code is pickled into it."""

import pickletools
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_router.cluster.launchers.submitit.submission import Submission, to_json
from hpc_router.state.job_records import Runner
from hpc_router.state.run_directory import make_run
from tests.support.waiting import eventually_sync


def names_in(pickled: bytes) -> set[str]:
    """Every module and attribute that the pickle refers to."""
    strings: list[str] = []
    found = set()
    for opcode, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
        elif opcode.name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
    return found


def test_a_job_holds_a_name_and_plain_values(tmp_path: Path) -> None:
    """A pickle by value would run the submitter's old code on a node with another version, or not load at all."""
    run = make_run(tmp_path / "run")
    submission = Submission(str(run.path), {"math-0.g1": ["/bin/true"]})
    for job in submission.jobs:
        job.claim()
    module = "hpc_router.cluster.launchers.submitit.process"
    program = f"import sys; from {module} import *; print(submit(from_json(sys.argv[1])[0]).error)"
    done = subprocess.run(
        [sys.executable, "-c", program, to_json([submission])], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "None"
    pickled = next(submission.jobs[0].path.glob("*_submitted.pkl")).read_bytes()
    ours = {name for name in names_in(pickled) if name.startswith("hpc_router")}
    assert ours == {"hpc_router.cluster.launchers.job_entry.start"}
    assert b"code" not in pickled.replace(b"codecs", b"")
    info = submission.jobs[0].info()
    assert info is not None
    assert info.runner is Runner.PROCESS
    eventually_sync(lambda: submission.jobs[0].process())


@pytest.mark.parametrize(("stop", "began"), [(None, True), ('{"cancel_at": 1.0}', False)])
def test_a_job_that_was_cancelled_while_it_waited_does_not_begin(tmp_path: Path, stop: str | None, began: bool) -> None:
    run = make_run(tmp_path / "run")
    folder = run.jobs / "math-0.g1"
    folder.mkdir()
    if stop is not None:
        (folder / "stop.json").write_text(stop)
    mark = tmp_path / "began"
    body = [sys.executable, "-m", "hpc_router.cluster.launchers.job_entry", str(run.path), "math-0.g1", "0.1.0", "--"]
    subprocess.run([*body, "/usr/bin/touch", str(mark)], check=True)
    assert mark.exists() is began
