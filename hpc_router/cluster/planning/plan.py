"""The plan of a deployment: the commands and batch scripts that `up` would run, and the faults that are found before.

`up` makes the plan first and starts nothing if it has faults. All faults are reported at once, each with the key to
edit. Engines and Slurm are asked only if the config itself has no faults.
"""

import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hpc_router.cluster.control_loop.desired_state import excluded_nodes
from hpc_router.cluster.control_loop.forecast import read_estimates
from hpc_router.cluster.control_loop.job_requests import job_requests
from hpc_router.cluster.control_loop.slots import ROUTER_SLOT, Slot
from hpc_router.cluster.launchers.commands import SlurmCommandError
from hpc_router.cluster.launchers.interface import JobRequest
from hpc_router.cluster.launchers.select import launcher_for
from hpc_router.cluster.launchers.slurm.held_job import ask_held_job, step_fault
from hpc_router.cluster.launchers.slurm.node_fit import allocation_faults, site_faults, site_warnings
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob, setup_faults
from hpc_router.cluster.launchers.slurm.sbatch_test import NOT_CHECKED, check_submission
from hpc_router.cluster.launchers.slurm.sinfo import SlurmSite, ask_site
from hpc_router.cluster.planning.classifier_training import exemplars_of, training_text
from hpc_router.cluster.planning.config_faults import build_engines, own_faults, own_warnings
from hpc_router.cluster.planning.engine_flags import check_flags
from hpc_router.cluster.planning.handover_plan import HandoverPlan, handover_plans
from hpc_router.cluster.planning.prerequisites import CheckedHost, prerequisites
from hpc_router.cluster.planning.software_checks import is_address
from hpc_router.config.adapters import host_of, hosts
from hpc_router.config.schema import ClusterConfig, Deployment, ExpertConfig
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.expert.engine_process.command import drain_limit_s
from hpc_router.expert.engines import Engine, Place, engine_environment
from hpc_router.expert.engines.container import command_in_container
from hpc_router.net.job_environment import current_job_id
from hpc_router.state.private_folder import user_folder
from hpc_router.state.run_directory import RunDir

JOB_FOLDER: Final = "<job>"
"""Placeholder in the plan for the folder that an agent creates on its node."""
NEW_RUN: Final = Path("<run>")


_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSWORD|_KEY$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The engine's process inside an expert's job. `environment`: variables in addition to the node's own."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """The plan of one replica. `engine`: None for the router. `serves`: the expert, and the adapters on its engine."""

    expert: str
    request: JobRequest
    engine: EnginePlan | None = None
    serves: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        resources = self.request.resources
        return {
            "replica": self.request.replica,
            "expert": None if self.engine is None else self.expert,
            "serves": list(self.serves),
            "nodes": resources.nodes,
            "gpus": resources.gpus,
            "cpus": resources.cpus,
            "memory_gb": resources.memory_gb,
            "job": list(self.request.argv),
            "engine": None if self.engine is None else list(self.engine.argv),
            "environment": {} if self.engine is None else without_secrets(self.engine.environment),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The jobs that `up` would submit. `jobs`: the Slurm jobs with their batch scripts; with `cluster=allocation`, the
    steps. `warnings`: texts about values that may be unintended, and about checks that could not be made."""

    deployment: Deployment
    replicas: tuple[ReplicaPlan, ...]
    jobs: tuple[BatchJob, ...] = ()
    warnings: tuple[str, ...] = ()
    handovers: tuple[HandoverPlan, ...] = ()
    classifier: str | None = None
    """What the classifier will be trained from; None if `up` trains none."""

    def to_json(self) -> dict[str, Any]:
        scripts = {replica: script_without_secrets(job) for job in self.jobs for replica in job.replicas}
        return {
            "name": self.deployment.name,
            "cluster": self.deployment.cluster.kind,
            "policy": self.deployment.policy.kind,
            "fallback": self.deployment.policy.fallback,
            "classifier": self.classifier,
            "gpus": sum(r.request.resources.total_gpus for r in self.replicas),
            "replicas": [{**r.to_json(), "script": scripts.get(r.request.replica)} for r in self.replicas],
            "sbatch": [
                {"replicas": list(job.replicas), "script": script_without_secrets(job)}
                for job in self.jobs
                if job.jobid is None
            ],
            "handovers": [handover.to_json() for handover in self.handovers],
            "warnings": list(self.warnings),
        }

    def alike(self) -> list[list[BatchJob]]:
        """Returns the jobs in groups. The scripts of a group differ only in the names of replicas."""
        found: dict[str, list[BatchJob]] = {}
        for job in self.jobs:
            script = job.script()
            for number, replica in enumerate(job.replicas):
                script = script.replace(replica, f"<{number}>")
            found.setdefault(script, []).append(job)
        return list(found.values())


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment with placeholders in place of secrets."""
    return {key: "***" if _SECRET.search(key) else value for key, value in environment.items()}


def script_without_secrets(job: BatchJob) -> str:
    """Returns the batch script with placeholders in place of secrets."""
    script = job.script()
    for key, value in job.cluster.env.items():
        if _SECRET.search(key):
            script = script.replace(f"export {key}={shlex.quote(value)}\n", f"export {key}='***'\n")
    return script


def make_plan(deployment: Deployment, *, run: RunDir | None = None, ask_engines: bool = True) -> Plan:
    """Returns the plan of the deployment. `run`: the run directory; None for a new run. `ask_engines`: whether to make
    the checks that start programs: the engines' interpreters check flags, and Slurm checks the jobs. Raises ConfigError
    with one line per fault."""
    run = run or RunDir(NEW_RUN)
    engines, engine_faults = build_engines(deployment.experts)
    faults = list(own_faults(deployment, exemplars=exemplars_of(deployment), engine_faults=engine_faults))
    if deployment.cluster.kind != "local":
        faults += setup_faults(deployment.cluster.setup)
    if faults:
        raise ConfigError("\n".join(faults))
    replicas = tuple(_replicas(deployment, run, engines))
    jobs = tuple(launcher_for(run, deployment).jobs([replica.request for replica in replicas]))
    runs = Path(deployment.runs) if run.path == NEW_RUN else run.path
    needed = prerequisites(CheckedHost(deployment, runs), ask=ask_engines)
    faults += needed.faults
    warnings = [*own_warnings(deployment), *needed.warnings]
    site = None
    if ask_engines:
        site, unknown = _site(deployment)
        warnings += unknown
        for found_faults, found_warnings in (
            check_flags(engines, deployment.experts, deployment.cluster),
            _slurm_faults(deployment, jobs, site),
        ):
            faults.extend(found_faults)
            warnings.extend(found_warnings)
    if faults:
        raise ConfigError("\n".join(faults))
    handovers = handover_plans(deployment, read_estimates(run), site)
    return Plan(deployment, replicas, jobs, tuple(warnings), tuple(handovers), training_text(deployment))


def _site(deployment: Deployment) -> tuple[SlurmSite | None, list[str]]:
    """Asks Slurm about its partitions and nodes. Returns (answer, no warnings) or, if Slurm does not answer, (None, a
    warning)."""
    if deployment.cluster.kind != "slurm":
        return None, []
    try:
        return ask_site(), []
    except LaunchError as error:
        return None, [f"{NOT_CHECKED}{error}; `up` needs it"]


def _slurm_faults(
    deployment: Deployment, jobs: tuple[BatchJob, ...], site: SlurmSite | None
) -> tuple[list[str], list[str]]:
    """Returns faults and warnings about the jobs; none on cluster=local. If `site` does not allow a value, that is a
    fault only if sbatch refuses the job: a site's submit plugin may choose another partition, and a qos may allow more
    than the partition."""
    if deployment.cluster.kind == "allocation":
        return _allocation_faults(deployment, jobs)
    if site is None:
        return [], []
    misfits = site_faults(deployment, site)
    refused, doubtful = check_submission(deployment, jobs)
    if refused:  # `misfits` name the wrong value, which Slurm's own texts often do not
        return misfits or refused, []
    if not any(note.startswith(NOT_CHECKED) for note in doubtful):
        misfits = [f"{misfit}; sbatch accepts it, but such a job may never start" for misfit in misfits]
    return [], [*misfits, *site_warnings(deployment, site), *doubtful]


def _allocation_faults(deployment: Deployment, jobs: tuple[BatchJob, ...]) -> tuple[list[str], list[str]]:
    job_id = current_job_id()
    if job_id is None:
        return [], ["cluster=allocation: this is not a Slurm job; `up` must run in one (salloc, or an sbatch script)"]
    name = f"job {job_id}"
    try:
        held = ask_held_job(job_id)
        misfits = allocation_faults(deployment, held.kinds, name) if held.kinds else []
        fault = None if misfits else step_fault(jobs)
    except SlurmCommandError as error:
        return [], [f"{NOT_CHECKED}{error}; `up` needs it"]
    faults = [*misfits, *([fault] if fault is not None else [])]
    return faults, list(_end_warnings(deployment, name, held.ends_at))


def _end_warnings(deployment: Deployment, name: str, ends_at: float | None) -> Iterator[str]:
    left_s = math.inf if ends_at is None else ends_at - time.time()
    for expert, config in hosts(deployment.experts).items():
        if config.replicas and left_s < config.engine.startup_timeout_s:
            key = f"experts.{expert}.engine.startup_timeout_s={config.engine.startup_timeout_s:g}"
            yield f"{name} ends in {max(left_s, 0) / 60:.0f} min with all its steps, before {key} has passed"
            return


def with_absolute_paths(deployment: Deployment) -> Deployment:
    """Returns the deployment with absolute local paths, so that it does not depend on the working directory."""

    def expert(name: str, config: ExpertConfig) -> ExpertConfig:
        engine = replace(config.engine, python=_interpreter(config.engine.python))
        model, kind = config.model, deployment.experts[host_of(deployment.experts, name)].engine.kind
        local = Path(model).expanduser()
        model = os.path.abspath(local) if local.is_dir() and kind != "sim" else model  # noqa: PTH100
        return replace(config, model=model, engine=engine)

    policy = deployment.policy
    if policy.artefact is not None:
        policy = replace(policy, artefact=_absolute(policy.artefact))
    experts = {name: expert(name, config) for name, config in deployment.experts.items()}
    return replace(deployment, policy=policy, cluster=_absolute_cluster(deployment.cluster), experts=experts)


def _absolute_cluster(cluster: ClusterConfig) -> ClusterConfig:
    container = cluster.container
    if container.image is not None and not is_address(container.image):
        container = replace(container, image=_absolute(container.image))
    container = replace(container, binds=[_absolute_bind(bind) for bind in container.binds])
    return replace(cluster, python=_interpreter(cluster.python), container=container)


def _absolute_bind(bind: str) -> str:
    """Returns the bind `SOURCE[:TARGET[:ro]]` with an absolute SOURCE, which is a path outside of the container."""
    source, colon, inside = bind.partition(":")
    return _absolute(source) + colon + inside


def _interpreter(python: str | None) -> str | None:
    """Returns the absolute path of an interpreter. Leaves a name without a slash as it is, because the job looks it up
    on its own PATH."""
    return _absolute(python) if python and "/" in python else python


def _absolute(path: str) -> str:
    """Returns the absolute path. Keeps symbolic links, because the interpreter of a virtual environment is one."""
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100


def _replicas(deployment: Deployment, run: RunDir, engines: Mapping[str, Engine]) -> Iterator[ReplicaPlan]:
    exclude = excluded_nodes(run)
    (router,) = job_requests(run, deployment, [ROUTER_SLOT.replica(1)], exclude=exclude)
    yield ReplicaPlan(ROUTER_SLOT.expert, router)
    cluster = deployment.cluster
    place = Place(user_folder(Path(cluster.scratch)) / JOB_FOLDER)
    for name, engine in engines.items():
        expert = deployment.experts[name]
        command = [*engine.argv(place), *engine.drain_flags(drain_limit_s(cluster), version=None)]
        argv = tuple(command_in_container(command, cluster.container, place, expert, models=engine.models))
        environment = engine_environment(engine, expert, place, inherited={}, cluster=cluster)
        replicas = [Slot(name, str(number)).replica(1) for number in range(expert.replicas)]
        for request in job_requests(run, deployment, replicas, exclude=exclude):
            yield ReplicaPlan(name, request, EnginePlan(argv, environment), tuple(engine.serves()))
