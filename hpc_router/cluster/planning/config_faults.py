"""Finds faults and warnings that follow from the config and this machine alone. Does not ask engines or Slurm."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpc_router.config.adapters import adapters_of, host_of, hosts
from hpc_router.config.schema import Deployment, ExpertConfig
from hpc_router.errors import ArtefactError, ConfigError, HpcRouterError, StagingError
from hpc_router.expert.engines import Engine, build_engine
from hpc_router.expert.engines.vllm import RUST_FRONTEND
from hpc_router.expert.staging.model_files import list_files, local_models
from hpc_router.expert.staging.node_disk import GB
from hpc_router.routing import artefact
from hpc_router.routing.confidence import MIN_DECISIONS
from hpc_router.routing.exemplars import usable_exemplars
from hpc_router.routing.features import Features


def build_engines(experts: Mapping[str, ExpertConfig]) -> tuple[dict[str, Engine], dict[str, str]]:
    """Returns, for each expert that has jobs, its engine with parsed options; or, in the second mapping, the fault if
    an option is not valid."""
    engines, faults = {}, {}
    for name, expert in hosts(experts).items():
        try:
            engines[name] = build_engine(name, expert, adapters=adapters_of(experts, name))
        except HpcRouterError as error:
            faults[name] = str(error)
    return engines, faults


def own_faults(
    deployment: Deployment, *, exemplars: Mapping[str, list[str]], engine_faults: Mapping[str, str]
) -> Iterator[str]:
    """Yields the faults of the deployment. `exemplars`: the exemplars of each expert that has any. `engine_faults`:
    faults of engine options by expert, from `build_engines`."""
    yield from _machine_faults(deployment)
    yield from _policy_faults(deployment, exemplars)
    yield from _variable_faults(deployment)
    python = deployment.cluster.python
    if python is not None and not executable(python):
        yield f"cluster.python={python}: not an executable file (valid: a Python interpreter that has hpc_router)"
    for name, expert in hosts(deployment.experts).items():
        in_image = deployment.cluster.container.image is not None and expert.engine.kind != "sim"
        if name in engine_faults:
            yield engine_faults[name]
        yield from _expert_faults(name, expert, adapters_of(deployment.experts, name), in_image=in_image)


def _machine_faults(deployment: Deployment) -> Iterator[str]:
    if deployment.cluster.kind != "local":
        return
    asked = {name: e.replicas * e.resources.gpus for name, e in deployment.experts.items() if e.resources.gpus}
    gpus = deployment.cluster.gpus or 0
    if sum(asked.values()) > gpus:
        each = ", ".join(f"{name} {count}" for name, count in asked.items())
        yield f"cluster.gpus={gpus}: all replicas together need {sum(asked.values())} GPUs ({each})"


def _variable_faults(deployment: Deployment) -> Iterator[str]:
    """Yields a fault for each environment in the config that sets RUST_FRONTEND. This variable chooses vLLM's HTTP
    server, but `plan` checks that server's options only if the engine option `frontend` chooses it."""
    experts = {name: e for name, e in hosts(deployment.experts).items() if e.engine.kind == "vllm"}
    given = {"cluster.env": deployment.cluster.env} if experts else {}
    for key, env in (given | {f"experts.{name}.engine.env": e.engine.env for name, e in experts.items()}).items():
        if RUST_FRONTEND in env:
            yield f"{key}.{RUST_FRONTEND}: not a variable to set; use experts.<name>.engine.options.frontend"


def _expert_faults(name: str, expert: ExpertConfig, adapters: Mapping[str, str], *, in_image: bool) -> Iterator[str]:
    python = expert.engine.python
    if python is not None and not in_image and not executable(python):
        key = f"experts.{name}.engine.python={python}"
        yield f"{key}: not an executable file (valid: a Python interpreter that has the engine)"
    if expert.engine.kind == "sim":
        return
    for one, model, what in ((name, expert.model, "a model"), *((n, m, "an adapter") for n, m in adapters.items())):
        if _looks_like_path(model) and not Path(model).expanduser().exists():
            valid = f"{what}'s folder, or a hub id such as org/name"
            yield f"experts.{one}.model={model}: no such folder (valid: {valid})"


def executable(python: str) -> bool:
    """Returns whether the interpreter `python`, a path or a name on PATH, can be executed on this machine."""
    path = python if "/" in python else shutil.which(python)
    return path is not None and os.access(path, os.X_OK) and Path(path).is_file()


def _looks_like_path(model: str) -> bool:
    """Returns whether the model is a path rather than a hub id, which is `name` or `org/name`."""
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1


def _policy_faults(deployment: Deployment, exemplars: Mapping[str, list[str]]) -> Iterator[str]:
    policy = deployment.policy
    if policy.kind != "classifier" or not deployment.experts:
        return
    try:
        if policy.artefact is None:
            usable = usable_exemplars(dict(exemplars), features=Features())
            calibrated, measured = sum(map(len, usable.values())) >= MIN_DECISIONS, False
        else:
            trained = artefact.read(Path(policy.artefact))
            calibrated, measured = trained.calibration is not None, trained.quality is not None
        if policy.cost_weight is not None and not measured:
            yield (
                f"policy.cost_weight={policy.cost_weight:g}: the classifier has no measured quality; it needs "
                "policy.artefact with a training of method=measured"
            )
        if policy.min_confidence is not None and not calibrated:
            yield (
                f"policy.min_confidence={policy.min_confidence:g}: the classifier does not know how certain its "
                f"decisions are; it needs {MIN_DECISIONS} exemplars, or an artefact trained with method=exemplars or "
                "method=discovered (policy.margin needs neither)"
            )
    except ArtefactError as error:
        yield f"policy.artefact={policy.artefact}: {error}"
    except ConfigError as error:
        yield str(error)


def own_warnings(deployment: Deployment) -> Iterator[str]:
    """Yields warnings about values that are valid but may be unintended."""
    with_jobs = hosts(deployment.experts)
    if not deployment.experts:
        yield "no experts: endpoints join through `hpc-router register`"
    elif not any(expert.replicas for expert in with_jobs.values()):
        yield "every expert has replicas=0: nothing will serve until `hpc-router scale`"
    fallback = deployment.policy.fallback
    if fallback is not None and deployment.experts:
        host = host_of(deployment.experts, fallback)
        if with_jobs[host].replicas == 0:
            whose = f"the fallback expert '{fallback}'"
            yield f"{whose} has replicas=0" if host == fallback else f"{whose} is served by '{host}': replicas=0"
    yield from _never_chosen(deployment)
    yield from _ineffective(deployment)
    yield from _not_staged(deployment)
    yield from _without_priority(deployment)
    cpus = sum(e.replicas * e.resources.cpus for e in with_jobs.values())
    have = os.cpu_count() or 1
    if deployment.cluster.kind == "local" and cpus > have:
        yield f"the replicas ask for {cpus} CPUs, this machine has {have}: the replicas will share them"


def _without_priority(deployment: Deployment) -> Iterator[str]:
    """Yields a warning about engines that do not order requests by priority, if the config limits batch requests so
    that interactive ones are served first."""
    if deployment.router.classes.batch.max_in_flight is None:
        return
    engines, _ = build_engines(deployment.experts)
    without = [name for name, engine in engines.items() if not engine.info().priority]
    if without:
        key = "experts.NAME.engine.options.extra.scheduling-policy=priority"
        yield f"batch requests in these engines delay interactive ones: {', '.join(without)} (vLLM and sim: {key})"


def _never_chosen(deployment: Deployment) -> Iterator[str]:
    """Yields a warning about experts that the classifier can never choose. Call it only for a deployment without
    faults, because it reads the artefact."""
    policy = deployment.policy
    if policy.kind != "classifier":
        return
    if policy.artefact is None:
        chosen = {name for name, expert in deployment.experts.items() if expert.exemplars}
        why, advice = "no exemplars", "requests can still name them"
    else:
        chosen = artefact.read_experts(Path(policy.artefact))
        why, advice = f"no cluster of policy.artefact={policy.artefact} is theirs", "`hpc-router classify assign`"
    never = [name for name in deployment.experts if name not in chosen and name != policy.fallback]
    if never:
        yield f"{why}, so `auto` never goes to: {', '.join(never)} ({advice})"


def _ineffective(deployment: Deployment) -> Iterator[str]:
    """Yields warnings about keys that have no effect with the values of other keys, such as `simulate.gpu` if no expert
    has a vLLM engine, or `cluster.modules` if jobs have no batch script."""
    gpu, engines = deployment.simulate.gpu, [expert.engine for expert in deployment.experts.values()]
    if gpu is not None and not any(engine.options.get("roofline") for engine in engines):
        yield f"simulate.gpu={gpu} has no effect: it replaces vLLM engines, and no expert has one"
    cluster = deployment.cluster
    given = [f"cluster.{name}" for name in ("modules", "setup") if getattr(cluster, name)]
    if cluster.kind == "local" and given:
        have = "has" if len(given) == 1 else "have"
        yield f"{' and '.join(given)} {have} no effect with cluster=local: load and set up before `up` starts the jobs"
    if cluster.stage_gb is not None and cluster.stage_to is None:
        yield "cluster.stage_gb has no effect without cluster.stage_to"


def _not_staged(deployment: Deployment) -> Iterator[str]:
    """Yields warnings about models that are not copied to the nodes although `cluster.stage_to` is set."""
    cluster, experts = deployment.cluster, deployment.experts
    if cluster.stage_to is None:
        return
    models = {n: e.model for n, e in experts.items() if experts[host_of(experts, n)].engine.kind != "sim"}
    local = local_models(models.values())
    hub = sorted({model for model in models.values() if model not in local})
    if hub:
        what = "is a hub id and is" if len(hub) == 1 else "are hub ids and are"
        yield f"cluster.stage_to: {', '.join(hub)} {what} not copied to the nodes: the hub's cache (HF_HOME) holds them"
    for model in local:
        try:
            size = list_files(Path(model)).size / GB
        except (StagingError, OSError) as error:
            yield f"cluster.stage_to: {model} is not copied to the nodes: {error}"
            continue
        if cluster.stage_gb is not None and size > cluster.stage_gb:
            yield f"cluster.stage_gb={cluster.stage_gb:g}: {model} is not copied to the nodes: it has {size:.1f} GB"
