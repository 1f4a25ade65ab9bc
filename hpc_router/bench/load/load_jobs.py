"""Who makes the load: this process, or several load jobs that begin together and whose results are merged."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, Protocol

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.load.generator import LoadResult, LoadTarget, carry_out, from_json, merged
from hpc_router.bench.load.load_job_main import order
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.workload import Point, jobs_for, workload
from hpc_router.errors import LaunchError
from hpc_router.net.job_environment import without_job_variables
from hpc_router.state.atomic_files import exists_now, replace_json
from hpc_router.state.run_directory import private_umask

POLL_S: Final = 0.1
BEAT_S: Final = 5.0
AHEAD_S: Final = 2.0
"""An order is given so long before the load begins, for every job to have read it."""
START_S: Final = 600.0
APART_S: Final = 1.0
"""Jobs that began further apart did not load at the same time."""


class LoadJobs(Protocol):
    def load(self, target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], point: Point) -> LoadResult:
        """Blocks. Raises LaunchError."""


class InProcessLoad:
    """This process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], point: Point) -> LoadResult:
        return carry_out(target, config, workload(config, prompts, point), self._folder)


class SubmittedLoadJobs:
    """Load jobs of their own, started once for all points."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._folder, self._jobs, self._number = folder, jobs, 0

    def load(self, target: LoadTarget, config: BenchConfig, prompts: Sequence[BenchPrompt], point: Point) -> LoadResult:
        number, self._number = self._number, self._number + 1
        shared = replace(config, load_jobs=jobs_for(point, config))
        given = order(target, asdict(shared), list(prompts), point, time.time() + AHEAD_S)
        path = self._folder / f"order-{number}.json"
        replace_json(path, given)
        try:
            answers = [self._answer(self._folder / f"load-{number}.{job}.json", config) for job in range(self._jobs)]
        finally:
            path.unlink()  # it holds the token
        parts = [answer for answer in answers if answer is not None]
        begun = [part.started_at for part in parts]
        if max(begun) - min(begun) > APART_S:
            raise LaunchError(
                f"the load jobs began {max(begun) - min(begun):.1f} s apart: their clocks or files differ"
            )
        return merged(parts)

    def _answer(self, path: Path, config: BenchConfig) -> LoadResult | None:
        """None of a job that had nothing to do."""
        longest_s = config.warmup_s + (config.duration_s or config.timeout_s) + config.drain_s + 60.0
        _wait_for(path, longest_s, "a load job gave no answer")
        told = json.loads(path.read_bytes())
        if "failed" in told:
            raise LaunchError(f"a load job failed: {told['failed']}")
        return None if "idle" in told else from_json(told)


@contextmanager
def crew(config: BenchConfig, *, shared: Path) -> Iterator[LoadJobs]:
    """`shared`: a folder that jobs on other nodes see as well."""
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
    (folder / "beat").touch()
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder / "beat", over), daemon=True)
    beat.start()
    start = _sbatch if config.load_place == "slurm" else _processes
    try:
        with start(config, folder):
            for job in range(config.load_jobs):
                _wait_for(folder / f"ready.{job}", START_S, "a load job did not start")
            try:
                yield
            finally:
                (folder / "stop").touch()
    finally:
        over.set()
        beat.join()


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        path.touch()


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
    """One job each. Whatever job we run in ourselves does not leak into theirs."""
    environment = without_job_variables(os.environ)
    numbers: list[str] = []
    try:
        for job in range(config.load_jobs):
            script = f"#!/bin/bash\nexec {shlex.join(_command(folder, job))}\n"
            words = ["sbatch", "--parsable", f"--job-name=hpc-router-load-{job}", f"--output={folder}/log.{job}"]
            done = subprocess.run(
                [*words, *options_of(config.load_options)],
                input=script, text=True, capture_output=True, check=False, env=environment,
            )  # fmt: skip
            if done.returncode:
                raise LaunchError(f"sbatch refuses a load job: {done.stderr.strip()} (bench.load_options)")
            numbers.append(done.stdout.strip().partition(";")[0])
        yield
    except FileNotFoundError as error:
        raise LaunchError("bench.load_place=slurm: there is no sbatch on this machine") from error
    finally:
        if numbers:
            (folder / "stop").touch()
            subprocess.run(["scancel", *numbers], check=False, capture_output=True, env=environment)


def options_of(options: Mapping[str, Any]) -> list[str]:
    """`{"partition": "cpu", "exclusive": true}` as sbatch takes it."""
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items() if v is not None and v is not False]


def _wait_for(path: Path, patience_s: float, why: str) -> None:
    deadline = time.monotonic() + patience_s
    while not exists_now(path):
        if time.monotonic() > deadline:
            raise LaunchError(f"{why} within {patience_s:g} s ({path.parent.name})")
        time.sleep(POLL_S)
