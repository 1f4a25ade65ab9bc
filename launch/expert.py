"""Starts one replica of an expert in the foreground, in addition to those that `up` started in the same run.

    python -m launch.expert run=runs/mine name=math
    python -m launch.expert run=runs/mine name=math experts.math.engine.options.ttft_ms=100

Overrides apply to the run's config. For a run without one, the config is composed as by `up`. Ctrl-C drains the
replica. An expert on several nodes is one step of a Slurm job, with one task per node:

    srun --nodes=2 --ntasks-per-node=1 python -m launch.expert run=runs/mine name=large
"""

import os
import sys
from pathlib import Path

from hpc_router.cluster.commands.manual_start import claim_expert, join_expert, rank_of, step_of
from hpc_router.cluster.planning.plan import make_plan, with_absolute_paths
from hpc_router.config import compose, frozen
from hpc_router.config.adapters import host_of
from hpc_router.errors import ConfigError, suggest
from hpc_router.expert.job import main
from hpc_router.state.run_directory import make_run
from launch.entry import Call, launch


def expert(call: Call) -> int:
    path, name = Path(call.required("run")), call.required("name")
    if (path / "config.yaml").exists():
        base = frozen.read(path / "config.yaml")
        deployment = compose.with_overrides(base, call.overrides, config_dir=call.config_dir)
    else:
        deployment = compose.load_deployment(call.overrides, config_dir=call.config_dir)
    if name not in deployment.experts:
        raise ConfigError(f"name={name}: no such expert{suggest(name, deployment.experts)}")
    host = host_of(deployment.experts, name)
    if host != name:
        raise ConfigError(f"name={name}: it is an adapter on the engine of '{host}'; start that instead: name={host}")
    deployment = with_absolute_paths(deployment)
    make_plan(deployment, ask_engines=False)
    step = step_of(os.environ)
    rank = rank_of(step, name, nodes=deployment.experts[name].resources.nodes)
    run = make_run(path)
    replica = join_expert(run, name, step) if step is not None and rank > 0 else claim_expert(run, name)
    return main(run.path, replica, deployment, rank=rank)


if __name__ == "__main__":
    sys.exit(launch(expert, own=("run", "name")))
