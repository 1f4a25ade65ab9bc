"""What a deployment would run, to the exact command, and what only the whole of it on this machine can show wrong.

`up` makes the plan first: nothing starts when it is refused. All faults are told at once, each with the key to edit.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hpc_router.cluster.flags import check_flags
from hpc_router.cluster.launcher import JobRequest
from hpc_router.cluster.requests import request_for
from hpc_router.cluster.slots import ROUTER_SLOT, Slot
from hpc_router.config import Deployment, ExpertConfig
from hpc_router.errors import ArtefactError, ConfigError, HpcRouterError
from hpc_router.expert.engines import Place, build_engine
from hpc_router.routing import artefact, exemplars
from hpc_router.routing.features import Features
from hpc_router.rundir import RunDir

FOLDER: Final = "<job>"
"""Stands in the plan for the folder that each agent makes on its node."""
NEW_RUN: Final = Path("<run>")


_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSWORD|_KEY$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The engine's process inside an expert's job."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """`engine` is None for the router."""

    expert: str
    request: JobRequest
    engine: EnginePlan | None = None

    def to_json(self) -> dict[str, Any]:
        resources = self.request.resources
        return {
            "replica": self.request.replica,
            "expert": None if self.engine is None else self.expert,
            "nodes": resources.nodes,
            "gpus": resources.gpus,
            "cpus": resources.cpus,
            "memory_gb": resources.memory_gb,
            "job": list(self.request.argv),
            "engine": None if self.engine is None else list(self.engine.argv),
            "environment": {} if self.engine is None else shown(self.engine.environment),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """`warnings`: what may be meant so."""

    deployment: Deployment
    replicas: tuple[ReplicaPlan, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.deployment.name,
            "cluster": self.deployment.cluster.kind,
            "policy": self.deployment.policy.kind,
            "fallback": self.deployment.policy.fallback,
            "gpus": sum(r.request.resources.gpus * r.request.resources.nodes for r in self.replicas),
            "replicas": [replica.to_json() for replica in self.replicas],
            "warnings": list(self.warnings),
        }


def shown(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what looks like a secret."""
    return {key: "***" if _SECRET.search(key) else value for key, value in environment.items()}


def make_plan(deployment: Deployment, *, run: RunDir | None = None, ask_engines: bool = True) -> Plan:
    """Raises ConfigError with one line per fault. `ask_engines`: let the engines' own interpreters check flags."""
    faults = [*_machine_faults(deployment), *_policy_faults(deployment)]
    for name, expert in deployment.experts.items():
        faults.extend(_expert_faults(name, expert))
    warnings = list(_warnings(deployment))
    if ask_engines and not faults:
        wrong, unsure = check_flags(deployment.experts)
        faults.extend(wrong)
        warnings.extend(unsure)
    if faults:
        raise ConfigError("\n".join(faults))
    return Plan(deployment, tuple(_replicas(deployment, run or RunDir(NEW_RUN))), tuple(warnings))


def settled(deployment: Deployment) -> Deployment:
    """The same deployment whatever folder it is started from: local paths are made absolute."""

    def expert(config: ExpertConfig) -> ExpertConfig:
        python = config.engine.python
        engine = replace(config.engine, python=_absolute(python) if python and "/" in python else python)
        model = config.model
        local = Path(model).expanduser()
        model = os.path.abspath(local) if local.is_dir() and config.engine.kind != "sim" else model  # noqa: PTH100
        return replace(config, model=model, engine=engine)

    policy = deployment.policy
    if policy.artefact is not None:
        policy = replace(policy, artefact=_absolute(policy.artefact))
    return replace(deployment, policy=policy, experts={n: expert(e) for n, e in deployment.experts.items()})


def _absolute(path: str) -> str:
    """Links are kept: a virtual environment's interpreter is one."""
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100


def _replicas(deployment: Deployment, run: RunDir) -> Iterator[ReplicaPlan]:
    router = request_for(run, deployment, ROUTER_SLOT.replica(1))
    yield ReplicaPlan(ROUTER_SLOT.expert, router)
    place = Place(Path(deployment.cluster.scratch) / f"hpc-router-{os.getuid()}" / FOLDER)
    for name, expert in deployment.experts.items():
        engine = build_engine(name, expert)
        environment = {**engine.environment(place), **expert.engine.env}
        for number in range(expert.replicas):
            request = request_for(run, deployment, Slot(name, str(number)).replica(1))
            yield ReplicaPlan(name, request, EnginePlan(tuple(engine.argv(place)), environment))


def _machine_faults(deployment: Deployment) -> Iterator[str]:
    asked = {name: e.replicas * e.resources.gpus for name, e in deployment.experts.items() if e.resources.gpus}
    gpus = deployment.cluster.gpus
    if deployment.cluster.kind == "local" and sum(asked.values()) > gpus:
        each = ", ".join(f"{name} {count}" for name, count in asked.items())
        yield f"cluster.gpus={gpus}: this machine has fewer GPUs than all replicas need: {sum(asked.values())} ({each})"


def _expert_faults(name: str, expert: ExpertConfig) -> Iterator[str]:
    at = f"experts.{name}"
    try:
        build_engine(name, expert)
    except HpcRouterError as error:
        yield str(error)
    python = expert.engine.python
    if python is not None and not _executable(python):
        yield f"{at}.engine.python={python}: not an executable file (valid: a Python interpreter that has the engine)"
    if expert.engine.kind != "sim" and _looks_like_path(expert.model) and not Path(expert.model).expanduser().exists():
        yield f"{at}.model={expert.model}: no such folder (valid: a model's folder, or a hub id such as org/name)"


def _executable(python: str) -> bool:
    path = python if "/" in python else shutil.which(python)
    return path is not None and os.access(path, os.X_OK) and Path(path).is_file()


def _looks_like_path(model: str) -> bool:
    """A hub id is `name` or `org/name`."""
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1


def _policy_faults(deployment: Deployment) -> Iterator[str]:
    policy = deployment.policy
    if policy.kind != "classifier" or not deployment.experts:
        return
    try:
        if policy.artefact is None:
            exemplars.check(taught(deployment), features=Features())
        else:
            artefact.read(Path(policy.artefact))
    except ArtefactError as error:
        yield f"policy.artefact={policy.artefact}: {error}"
    except ConfigError as error:
        yield str(error)


def taught(deployment: Deployment) -> dict[str, list[str]]:
    """The exemplars of the experts that have any."""
    return {name: list(expert.exemplars) for name, expert in deployment.experts.items() if expert.exemplars}


def _warnings(deployment: Deployment) -> Iterator[str]:
    if not deployment.experts:
        yield "no experts: endpoints join through `hpc-router register`"
    elif not any(expert.replicas for expert in deployment.experts.values()):
        yield "every expert has replicas=0: nothing will serve until `hpc-router scale`"
    fallback = deployment.policy.fallback
    if fallback is not None and deployment.experts and deployment.experts[fallback].replicas == 0:
        yield f"the fallback expert '{fallback}' has replicas=0"
    unreached = [name for name, e in deployment.experts.items() if not e.exemplars and name != fallback]
    if deployment.policy.kind == "classifier" and deployment.policy.artefact is None and unreached:
        yield f"no exemplars, so `auto` never goes to: {', '.join(unreached)} (they answer by name)"
    cpus = sum(e.replicas * e.resources.cpus for e in deployment.experts.values())
    have = os.cpu_count() or 1
    if deployment.cluster.kind == "local" and cpus > have:
        yield f"the replicas ask for {cpus} CPUs, this machine has {have}: they will share"
