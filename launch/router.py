"""Starts only a router, in the foreground. `hpc-router register` or `up` add endpoints to its run.

    python -m launch.router run=runs/mine router.port=8000
    python -m launch.router run=runs/mine policy=classifier policy.artefact=DIR policy.fallback=big

Overrides apply to the run's config. A run without one starts without experts. Ctrl-C drains the router.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig

from hpc_router.cluster.commands.manual_start import claim_router
from hpc_router.cluster.commands.up import train_classifier
from hpc_router.cluster.planning.plan import with_absolute_paths
from hpc_router.config import compose, frozen
from hpc_router.config.schema import Deployment
from hpc_router.config.sources import parse_override
from hpc_router.state.run_directory import RunDir, make_run
from launch.entry import Call, launch


def router(call: Call) -> int:
    path = Path(call.required("run"))
    deployment = with_absolute_paths(deployment_for(path, call))
    run = make_run(path)
    train_classifier(run, deployment)
    replica = claim_router(run)
    if not HydraConfig.initialized():  # a job of a sweep has to return to Hydra
        become_router(run, deployment, replica)
    from hpc_router.router.main import main

    return main(run, deployment, replica=replica)


def become_router(run: RunDir, deployment: Deployment, replica: str) -> NoReturn:
    """Replace this process by the router, so that the modules that composed the config take no memory in its
    processes."""
    config = os.memfd_create("config", 0)  # 0: the router inherits it
    os.write(config, frozen.to_yaml(deployment).encode())
    words = ["--run", str(run.path), "--replica", replica, "--config", f"/proc/self/fd/{config}"]
    os.execv(sys.executable, [sys.executable, "-m", "hpc_router.router", *words])


def deployment_for(path: Path, call: Call) -> Deployment:
    """Returns the run's config with the overrides applied; for a run without one, a config without experts."""
    if (path / "config.yaml").exists():
        base = frozen.read(path / "config.yaml")
        return compose.with_overrides(base, call.overrides, config_dir=call.config_dir)
    keys = {parse_override(text).key_or_group for text in call.overrides}
    overrides = list(call.overrides)
    if "topology" not in keys:
        overrides.insert(0, "topology=empty")
    deployment = compose.load_deployment(overrides, config_dir=call.config_dir)
    if not keys & {"policy", "policy.kind", "policy.artefact"} and not deployment.experts:
        deployment.policy.kind = "model_field"  # without experts, there is nothing to train a classifier for
    return deployment


if __name__ == "__main__":
    sys.exit(launch(router, own=("run",)))
