"""A router alone, in the foreground, on a run that endpoints join by `hpc-router register` or by `up`.

    python -m launch.router run=runs/mine router.port=8000
    python -m launch.router run=runs/mine policy=classifier policy.artefact=DIR policy.fallback=big

A run that has a config gives the base, overrides go on top; else there are no experts of our own. Ctrl-C drains it.
"""

import sys
from pathlib import Path

from hpc_router.cluster.commands.manual_start import claim_router
from hpc_router.cluster.commands.up import train_classifier
from hpc_router.cluster.planning.plan import with_absolute_paths
from hpc_router.config import compose, frozen
from hpc_router.config.schema import Deployment
from hpc_router.config.sources import parse_override
from hpc_router.state.run_directory import make_run
from launch.entry import Call, launch


def router(call: Call) -> int:
    path = Path(call.required("run"))
    deployment = with_absolute_paths(deployment_for(path, call))
    run = make_run(path)
    train_classifier(run, deployment)
    from hpc_router.router.main import main

    return main(run, deployment, replica=claim_router(run))


def deployment_for(path: Path, call: Call) -> Deployment:
    """The run's own config with the overrides on top, or one without experts."""
    if (path / "config.yaml").exists():
        base = frozen.read(path / "config.yaml")
        return compose.with_overrides(base, call.overrides, config_dir=call.config_dir)
    keys = {parse_override(text).key_or_group for text in call.overrides}
    given = list(call.overrides)
    if "topology" not in keys:
        given.insert(0, "topology=empty")
    deployment = compose.load_deployment(given, config_dir=call.config_dir)
    if not keys & {"policy", "policy.kind", "policy.artefact"} and not deployment.experts:
        deployment.policy.kind = "model_field"  # nothing to classify with
    return deployment


if __name__ == "__main__":
    sys.exit(launch(router, own=("run",)))
