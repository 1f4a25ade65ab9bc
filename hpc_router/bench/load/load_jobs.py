"""Runs a load in this process, or in several load jobs that start at the same time and whose results are merged."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.background import repeated
from hpc_router.bench.config import BenchConfig
from hpc_router.bench.load.generator import LoadResult, LoadTarget, from_json, merged, run_load
from hpc_router.bench.load.load_job_main import task
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.search import most_in_flight
from hpc_router.bench.workload import Point, jobs_for, workload
from hpc_router.errors import LaunchError
from hpc_router.net.job_environment import without_job_variables
from hpc_router.state.atomic_files import exists_now, replace_json
from hpc_router.state.run_directory import private_umask

POLL_S: Final = 0.1
BEAT_S: Final = 5.0
LEAD_S: Final = 2.0
"""Time in seconds between the writing of a task file and the start of its load, in which every job reads the file."""
READY_TIMEOUT_S: Final = 600.0
MAX_SKEW_S: Final = 1.0
"""Maximum difference between the jobs' start times, in seconds. With a larger one, the jobs did not load the target
together."""


class InProcessLoad:
    """A single load generator that this process runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], point: Point) -> LoadResult:
        """Sends the load of `point` from this process, and returns the result when it has ended. Raises LaunchError."""
        most = None if point.rate_per_s is None else most_in_flight(config, point.rate_per_s)
        return run_load(target, config, workload(config, prompts, point), self._folder, most_in_flight=most)


class SubmittedLoadJobs:
    """Load jobs that are started once and used for all measurement points, one point at a time."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._folder, self._jobs, self._number = folder, jobs, 0

    def run(self, target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], point: Point) -> LoadResult:
        """Makes the load jobs send the load of `point`, and returns their merged result. Raises LaunchError."""
        number, self._number = self._number, self._number + 1
        shared = replace(config, load_jobs=jobs_for(point, config))
        path = self._folder / f"task-{number}.json"
        replace_json(path, task(target, asdict(shared), list(prompts), point, time.time() + LEAD_S))
        try:
            results = [self._result(self._folder / f"result-{number}.{job}.json", config) for job in range(self._jobs)]
        finally:
            path.unlink()  # the file contains the token
        parts = [result for result in results if result is not None]
        starts = [part.started_at for part in parts]
        if max(starts) - min(starts) > MAX_SKEW_S:
            raise LaunchError(
                f"the load jobs started {max(starts) - min(starts):.1f} s apart: check the nodes' clocks and "
                "the shared file system"
            )
        return merged(parts)

    def _result(self, path: Path, config: BenchConfig) -> LoadResult | None:
        """Waits for a load job's result file at `path`, and returns the result; None if this job has no part in the
        point's load. Raises LaunchError if the job failed or writes no result in time."""
        timeout_s = config.warmup_s + (config.duration_s or config.timeout_s) + config.drain_s + 60.0
        _wait_for(path, timeout_s, "no result from a load job")
        result = json.loads(path.read_bytes())
        if "failed" in result:
            raise LaunchError(f"a load job failed: {result['failed']}")
        return None if "idle" in result else from_json(result)


LoadJobs = InProcessLoad | SubmittedLoadJobs


@contextmanager
def start_load_jobs(config: BenchConfig, *, shared: Path) -> Iterator[LoadJobs]:
    """Starts the load jobs that `config` requires, and stops them when the block ends. `shared`: a folder that load
    jobs on other nodes can read and write."""
    with private_umask():
        shared.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="load-", dir=shared))
    try:
        if config.load_jobs == 1 and config.load_place == "here":
            yield InProcessLoad(folder)
        else:
            with _started(config, folder):
                yield SubmittedLoadJobs(folder, config.load_jobs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(config: BenchConfig, folder: Path) -> Iterator[None]:
    beat = folder / "beat"
    beat.touch()
    start = _sbatch if config.load_place == "slurm" else _processes
    with repeated(beat.touch, every_s=BEAT_S), start(config, folder):
        for job in range(config.load_jobs):
            _wait_for(folder / f"ready.{job}", READY_TIMEOUT_S, "a load job did not start")
        try:
            yield
        finally:
            (folder / "stop").touch()


def _command(folder: Path, job: int) -> list[str]:
    return [sys.executable, "-m", "hpc_router.bench.load.load_job_main", str(folder), str(job)]


@contextmanager
def _processes(config: BenchConfig, folder: Path) -> Iterator[None]:
    processes = [subprocess.Popen(_command(folder, job)) for job in range(config.load_jobs)]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


@contextmanager
def _sbatch(config: BenchConfig, folder: Path) -> Iterator[None]:
    """Submits the load jobs of `config`, each as a Slurm job, and cancels them when the block ends. If this process
    runs in a Slurm job itself, `sbatch` runs without the variables of that job."""
    environment = without_job_variables(os.environ)
    numbers: list[str] = []
    try:
        for job in range(config.load_jobs):
            script = f"#!/bin/bash\nexec {shlex.join(_command(folder, job))}\n"
            argv = ["sbatch", "--parsable", f"--job-name=hpc-router-load-{job}", f"--output={folder}/log.{job}"]
            done = subprocess.run(
                [*argv, *options_of(config.load_options)],
                input=script, text=True, capture_output=True, check=False, env=environment,
            )  # fmt: skip
            if done.returncode:
                raise LaunchError(f"sbatch rejected a load job: {done.stderr.strip()} (check bench.load_options)")
            numbers.append(done.stdout.strip().partition(";")[0])
        yield
    except FileNotFoundError as error:
        raise LaunchError(
            "bench.load_place=slurm: sbatch is not installed on this machine (valid: bench.load_place=here)"
        ) from error
    finally:
        if numbers:
            (folder / "stop").touch()
            subprocess.run(["scancel", *numbers], check=False, capture_output=True, env=environment)


def options_of(options: Mapping[str, Any]) -> list[str]:
    """Formats sbatch options: `{"partition": "cpu", "exclusive": true}` gives `--partition=cpu --exclusive`."""
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items() if v is not None and v is not False]


def _wait_for(path: Path, timeout_s: float, message: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not exists_now(path):
        if time.monotonic() > deadline:
            raise LaunchError(f"{message} within {timeout_s:g} s ({path.parent.name})")
        time.sleep(POLL_S)
