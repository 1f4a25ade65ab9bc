"""A request as the exact batch script that Slurm gets; pure but for `setup_faults`, so `plan` shows what `up` submits.

One job carries one replica, or several of one shape where a site gives whole nodes: then each is a step of its own,
with its own share of the node, its own end and its own cancellation. What every script does around its steps stands in
`batch.sh`, which it sources.
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
"""Options of ours that sbatch has by the same name."""


@dataclass(frozen=True, slots=True)
class BatchJob:
    """One Slurm job. `command` is what srun runs in each task of each step; `jobid`: the steps go into that job."""

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
        """Of one replica; all in one job have the same."""
        return self.requests[0].resources

    @property
    def folder(self) -> Path:
        """Of the first replica: the job's own files lie there."""
        return self.run.jobs / self.replicas[0]

    def options(self) -> dict[str, Any]:
        """Options of sbatch by their long names; True is a flag."""
        asked, count = effective_options(self.cluster, self.resources), len(self.requests)
        sizes = {
            "nodes": self.resources.nodes,
            "ntasks-per-node": count,
            "cpus-per-task": self.resources.cpus,
            "mem": _memory(self.resources, count),
            **_gpus(self.cluster.gpu_request, asked.gpu_type, self.resources.gpus * count),
        }
        ours = {
            "job-name": self.name,
            "chdir": self.run.path,
            "output": f"{_escape_percent(self.folder)}/%j_batch.log",
            "open-mode": "append",
            "no-requeue": True,
            "signal": f"USR2@{math.ceil(self.cluster.warn_s)}",
            "time": asked.walltime,
            "exclusive": asked.exclusive or None,
            **{name: getattr(asked, name) for name in _SAME_NAME},
            "exclude": ",".join(filter(None, [asked.exclude, *self.requests[0].exclude])) or None,
        }
        after, own = self.requests[0].after, asked.sbatch.get("dependency")
        if self.requests[0].dependency_met and isinstance(own, str):
            own = without_job_dependencies(own)
        both = [f"afterany:{after}" if after else None, own]  # without ours, successors would have successors
        further = {**asked.sbatch, "dependency": ",".join(str(each) for each in both if each) or None}
        return {k: v for k, v in {**ours, **sizes, **further}.items() if v is not None and v is not False}

    def script(self) -> str:
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
            yield " \\\n    ".join([f"step {shlex.quote(request.replica)} srun", *self._srun(request), self._task()])

    def _srun(self, request: JobRequest) -> Iterator[str]:
        asked, resources = effective_options(self.cluster, request.resources), request.resources
        folder = _escape_percent(self.run.jobs / request.replica)
        within: dict[str, Any] = {"jobid": self.jobid} if self.jobid else {}
        if self.jobid or len(self.requests) > 1:  # the job is shared: ask for this step's part of it
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
        kept = {k: v for k, v in {**ours, **asked.srun}.items() if v is not None and v is not False}
        yield from option_words(kept, quoted=True)

    def _task(self) -> str:
        return shlex.join(self.command)


def batch_jobs(run: RunDir, deployment: Deployment, requests: Sequence[JobRequest]) -> list[BatchJob]:
    """The jobs that carry these requests, in their order."""
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
    """The jobs' interpreter."""
    return cluster.python or sys.executable


def effective_options(cluster: ClusterConfig, resources: ResourceConfig) -> JobOptions:
    """The options of one job: its own, and the cluster's where it says nothing."""
    values: dict[str, Any] = {}
    for item in fields(JobOptions):
        general, own = getattr(cluster, item.name), getattr(resources, item.name)
        values[item.name] = {**general, **own} if isinstance(own, dict) else (general if own is None else own)
    return JobOptions(**values)


def without_job_dependencies(dependency: str) -> str | None:
    """The parts of a dependency that name no other jobs, such as `singleton`: those hold for each job anew."""
    parts = [part for part in dependency.split(",") if not part.strip().lower().startswith("after")]
    return ",".join(parts) or None


def option_words(options: Mapping[str, Any], *, quoted: bool = False) -> list[str]:
    """`{"mem": "4G", "exclusive": True}` -> `--mem=4G --exclusive`."""
    quote = shlex.quote if quoted else str
    return [f"--{name}" if value is True else f"--{name}={quote(str(value))}" for name, value in options.items()]


def setup_faults(setup: Sequence[str]) -> list[str]:
    """One line for each setup line that is not whole bash, in bash's words: it would end the job before any record of
    it is made. Reads and runs nothing of theirs; where there is no bash to ask, none is named."""
    told = []
    for number, line in enumerate(setup):
        # By itself, because `} ; {` fits into the script; in the script, because a line may go on after its end.
        said = _syntax_fault(line) or _syntax_fault("\n".join(_guarded(number, line)))
        if said:
            told.append(f"cluster.setup[{number}]: {said}")
    return told


def _guarded(number: int, line: str) -> tuple[str, ...]:
    return ("{", line, f"}} || setup_failed 'cluster.setup[{number}]'")


def _syntax_fault(text: str) -> str | None:
    """What bash says of it first. `extglob`: it changes how bash reads, and an earlier line may have set it."""
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
    said = done.stderr.strip().partition("\n")[0]  # a here-document without an end is a warning alone
    return re.sub(r"^\S+: line \d+: ", "", said) or None


def _grouped(requests: Sequence[JobRequest], cluster: ClusterConfig) -> Iterator[list[JobRequest]]:
    """Replicas of one shape together, up to `replicas_per_job`; routers and ranks over several nodes alone."""
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
    """Slurm replaces %-signs in file names."""
    return str(path).replace("%", "%%")
