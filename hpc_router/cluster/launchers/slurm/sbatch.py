"""Builds batch scripts from job requests. Pure except for `setup_faults`, so that `plan` shows what `up` submits.

A job has one replica. Where a site gives only whole nodes, a job may have several replicas with equal resources. Each
replica is then a step with its own share of the node, which starts, ends and is cancelled independently. The parts that
all scripts share are in `batch.sh`, which each script sources.
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from hpc_router.cluster.launchers.interface import JobRequest
from hpc_router.cluster.launchers.submitit.submission import task_command
from hpc_router.config.schema import ClusterConfig, Deployment, JobOptions, ResourceConfig
from hpc_router.state.run_directory import RunDir

LIBRARY: Final = Path(__file__).with_name("batch.sh")
MODULES: Final = Path(__file__).with_name("modules.sh")
_SAME_NAME: Final = ("partition", "account", "qos", "constraint", "reservation", "exclude")
"""Config keys that have the same name as their sbatch option."""


@dataclass(frozen=True, slots=True)
class BatchJob:
    """One Slurm job, or the steps to start in an existing job. `command`: what srun runs in each task. `jobid`: id of
    the existing job; None for a new job."""

    run: RunDir
    requests: tuple[JobRequest, ...]
    cluster: ClusterConfig
    name: str
    command: tuple[str, ...]
    jobid: str | None = None

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(request.replica for request in self.requests)

    @property
    def resources(self) -> ResourceConfig:
        """Returns the resources of one replica; all replicas of a job have the same."""
        return self.requests[0].resources

    @property
    def folder(self) -> Path:
        """Returns the job folder of the first replica, which contains the files of the Slurm job."""
        return self.run.jobs / self.replicas[0]

    @property
    def dependency(self) -> str | None:
        """The configured `sbatch.dependency`, even if `options` leaves it out because it was met; None if there is
        none."""
        return dependency_of(self.cluster, self.resources)

    def options(self) -> dict[str, Any]:
        """Returns the options of sbatch by their long names. An option without an argument has the value True."""
        options, count = effective_options(self.cluster, self.resources), len(self.requests)
        sizes = {
            "nodes": self.resources.nodes,
            "ntasks-per-node": count,
            "cpus-per-task": self.resources.cpus,
            "mem": _memory(self.resources, count),
            **_gpus(self.cluster.gpu_request, options.gpu_type, self.resources.gpus * count),
        }
        ours = {
            "job-name": self.name,
            "chdir": self.run.path,
            "output": f"{_escape_percent(self.folder)}/%j_batch.log",
            "open-mode": "append",
            "no-requeue": True,
            "signal": f"USR2@{math.ceil(self.cluster.warn_s)}",
            "time": options.walltime,
            "exclusive": options.exclusive or None,
            **{name: getattr(options, name) for name in _SAME_NAME},
            "exclude": excluded(self.cluster, self.requests[0]),
        }
        after, own = self.requests[0].after, self.dependency
        if self.requests[0].dependency_met and own is not None:
            own = without_job_dependencies(own)
        both = [f"afterany:{after}" if after else None, own]  # without `after` a standby would get a standby of its own
        extra = {**options.sbatch, "dependency": ",".join(str(each) for each in both if each) or None}
        return {k: v for k, v in {**ours, **sizes, **extra}.items() if v is not None and v is not False}

    def script(self) -> str:
        """Returns the text of the batch script."""
        head = [] if self.jobid else [f"#SBATCH {word}" for word in option_words(self.options(), quoted=True)]
        begin = shlex.join(["begin", str(self.run.jobs), *self.replicas])
        return "\n".join(["#!/bin/bash", *head, "", f". {shlex.quote(str(LIBRARY))}", begin, *self._setup(), ""]) + (
            "\n".join([*self._steps(), "finish", ""])
        )

    def _setup(self) -> Iterator[str]:
        for name, value in self.cluster.env.items():
            yield f"export {name}={shlex.quote(value)}"
        if self.cluster.modules:
            yield f". {shlex.quote(str(MODULES))}"
            for number, module in enumerate(self.cluster.modules):
                yield from ("ready", f"module load {shlex.quote(module)} || setup_failed 'cluster.modules[{number}]'")
        for number, line in enumerate(self.cluster.setup):
            yield from ("ready", *_guarded(number, line))
        yield "ready"

    def _steps(self) -> Iterator[str]:
        for request in self.requests:
            words = option_words(self.step_options(request), quoted=True)
            yield " \\\n    ".join([f"step {shlex.quote(request.replica)} srun", *words, self._task()])

    def step_options(self, request: JobRequest) -> dict[str, Any]:
        """Returns the options of the srun that starts the replica of `request`, by their long names."""
        options, resources = effective_options(self.cluster, request.resources), request.resources
        folder = _escape_percent(self.run.jobs / request.replica)
        within: dict[str, Any] = {"jobid": self.jobid} if self.jobid else {}
        if self.jobid or len(self.requests) > 1:  # the step gets its share of the job
            within |= {"overlap" if request.is_router else "exact": True, "mem": _memory(resources, 1)}
            within |= {"gres": f"gpu:{resources.gpus}" if resources.gpus else "none"}
        ours = {
            **within,
            "nodes": resources.nodes,
            "ntasks": resources.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": resources.cpus,
            "kill-on-bad-exit": 1,
            "export": "ALL",
            "unbuffered": True,
            "open-mode": "append",
            "output": f"{folder}/%j_%t_log.out",
            "error": f"{folder}/%j_%t_log.err",
        }
        return {k: v for k, v in {**ours, **options.srun}.items() if v is not None and v is not False}

    def _task(self) -> str:
        return shlex.join(self.command)


def batch_jobs(run: RunDir, deployment: Deployment, requests: Sequence[JobRequest]) -> list[BatchJob]:
    """Returns the Slurm jobs for these requests, in the same order. Several replicas may share a job."""
    cluster = deployment.cluster
    return [
        BatchJob(
            run=run,
            requests=tuple(group),
            cluster=cluster,
            name=f"{group[0].replica}:{deployment.name}",
            command=task_command(python_of(cluster), run.jobs / group[0].replica),
        )
        for group in _grouped(requests, cluster)
    ]


def python_of(cluster: ClusterConfig) -> str:
    """Returns the Python interpreter that runs the jobs' programs."""
    return cluster.python or sys.executable


def effective_options(cluster: ClusterConfig, resources: ResourceConfig) -> JobOptions:
    """Returns the Slurm options of a job: those in `resources`; where these set none, those in `cluster`."""
    values: dict[str, Any] = {}
    for item in fields(JobOptions):
        general, own = getattr(cluster, item.name), getattr(resources, item.name)
        values[item.name] = {**general, **own} if isinstance(own, dict) else (general if own is None else own)
    return JobOptions(**values)


def excluded(cluster: ClusterConfig, request: JobRequest) -> str | None:
    """Returns the nodes on which the job of `request` may not start, joined by commas: those that the config excludes
    and those in the request. Returns None if there are none."""
    configured = effective_options(cluster, request.resources).exclude
    return ",".join(filter(None, [configured, *request.exclude])) or None


def dependency_of(cluster: ClusterConfig, resources: ResourceConfig) -> str | None:
    """Returns the `sbatch.dependency` of a job with these resources; None if it has none."""
    value = effective_options(cluster, resources).sbatch.get("dependency")
    return value if isinstance(value, str) else None


def without_job_dependencies(dependency: str) -> str | None:
    """Returns the parts of a dependency that name no other job, such as `singleton`; None if there are none. Such parts
    remain when the named jobs have ended. A part that names jobs has a colon, whatever its type."""
    parts = [part for part in dependency.split(",") if ":" not in part]
    return ",".join(parts) or None


def option_words(options: Mapping[str, Any], *, quoted: bool = False) -> list[str]:
    """Returns command-line words: `{"mem": "4G", "exclusive": True}` -> `--mem=4G --exclusive`. `quoted`: whether to
    quote the values for a shell."""
    quote = shlex.quote if quoted else str
    return [f"--{name}" if value is True else f"--{name}={quote(str(value))}" for name, value in options.items()]


def setup_faults(setup: Sequence[str]) -> list[str]:
    """Returns a fault for each setup line that bash cannot parse: such a line would end the job before the job leaves a
    record. Executes nothing. Returns no faults if this machine has no /bin/bash."""
    faults = []
    for number, line in enumerate(setup):
        # Tested alone, because `} ; {` would be valid in the script, and in the script, because lines may be continued.
        message = _syntax_fault(line) or _syntax_fault("\n".join(_guarded(number, line)))
        if message:
            faults.append(f"cluster.setup[{number}]: {message}")
    return faults


def _guarded(number: int, line: str) -> tuple[str, ...]:
    return ("{", line, f"}} || setup_failed 'cluster.setup[{number}]'")


def _syntax_fault(text: str) -> str | None:
    """Returns bash's first syntax error in the text; None if there is none. Bash parses with the option `extglob`,
    which changes the syntax, because an earlier line may have set it."""
    try:
        done = subprocess.run(
            ["/bin/bash", "-O", "extglob", "-n"],
            input=f"{text}\n",
            env={"LC_ALL": "C"},
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except OSError:
        return None
    message = done.stderr.strip().partition("\n")[0]  # for a here-document without an end, bash only warns
    return re.sub(r"^\S+: line \d+: ", "", message) or None


def _grouped(requests: Sequence[JobRequest], cluster: ClusterConfig) -> Iterator[list[JobRequest]]:
    """Yields the requests in groups, one per Slurm job: at most `replicas_per_job` replicas with equal resources. A
    router, or a replica on several nodes, is a group by itself."""
    open_groups: list[list[JobRequest]] = []
    groups: list[list[JobRequest]] = []
    for request in requests:
        alone = request.is_router or request.resources.nodes > 1
        fitting = [g for g in open_groups if g[0].resources == request.resources]
        if alone or not fitting:
            group = [request]
            groups.append(group)
            if not alone:
                open_groups.append(group)
        else:
            group = fitting[0]
            group.append(request)
        if len(group) >= cluster.replicas_per_job and group in open_groups:
            open_groups.remove(group)
    yield from groups


def _memory(resources: ResourceConfig, count: int) -> str | None:
    return None if resources.memory_gb is None else f"{math.ceil(resources.memory_gb * count * 1024)}M"


def _gpus(form: str, kind: str | None, count: int) -> dict[str, str]:
    if not count:
        return {}
    what = f"{kind}:{count}" if kind else str(count)
    return {"gpus-per-node": what} if form == "gpus_per_node" else {"gres": f"gpu:{what}"}


def _escape_percent(path: Path) -> str:
    """Returns the path with each % doubled, because Slurm replaces patterns such as %j in file names."""
    return str(path).replace("%", "%%")
