"""Starts a deployment: `hpc-router up` with Hydra's own flags.

python -m launch.deploy topology=sim experts.math.replicas=2
python -m launch.deploy run=runs/mine wait=all
python -m launch.deploy topology=sim --cfg job
"""

import sys

from hpc_router.cli.deployment import run_up
from hpc_router.errors import ConfigError, suggest
from launch.entry import Call, launch

WAITS = ("any", "all")


def deploy(call: Call) -> int:
    wait = call.own.get("wait", "any")
    if wait not in WAITS:
        raise ConfigError(f"wait={wait}: not known{suggest(wait, WAITS)}")
    return run_up(call.path("run"), list(call.overrides), config_dir=call.config_dir, wait_all=wait == "all")


if __name__ == "__main__":
    sys.exit(launch(deploy, own=("run", "wait")))
