"""A run directory, and small programs that stand in for agents: real processes, submitted as real jobs are."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.cluster.launchers.local import LocalLauncher
from hpc_router.state.job_records import JobDir, Stop
from hpc_router.state.run_directory import RunDir, make_run

SERVICE = """
import json, os, signal, sys, time
out = sys.argv[1]
def stop(number, frame):
    open(out + ".stopped", "w").write(signal.Signals(number).name)
    sys.exit(0)
if sys.argv[2] == "polite":
    signal.signal(signal.SIGTERM, stop)
elif sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    sys.exit(3)
facts = {
    "pid": os.getpid(), "sid": os.getsid(0), "environ": dict(os.environ), "modules": sorted(sys.modules),
    "umask": os.umask(0o077), "usr2": signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL,
}
open(out + ".tmp", "w").write(json.dumps(facts))
os.rename(out + ".tmp", out)
while True:
    signal.pause()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@pytest.fixture
def service(run: RunDir) -> Path:
    path = run.path / "service.py"
    path.write_text(SERVICE)
    return path


@pytest.fixture
def launcher(run: RunDir) -> Iterator[LocalLauncher]:
    """A local launcher. Ends whatever a test leaves running."""
    launcher = LocalLauncher(run, gpus=4)
    yield launcher
    jobs = [JobDir(run, folder.name) for folder in run.jobs.iterdir()]
    others = [job for job in jobs if (info := job.info()) is None or info.job_id != str(os.getpid())]
    for job in others:
        job.write(Stop(cancel_at=time.time()))  # for a job that is just starting
    launcher.kill([job.replica for job in others])
