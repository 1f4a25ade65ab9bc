"""Checks that modules, the container's image and the program that starts containers exist.

The checks run on this machine, which sees the same shared file system as the nodes. A missing program is a warning,
because the nodes may have it; on cluster=local it is a fault.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from hpc_router.cluster.launchers.slurm.sbatch import MODULES
from hpc_router.config.schema import ClusterConfig, ContainerConfig

CHECK: Final = MODULES.with_name("check_modules.sh")
TIMEOUT_S: Final = 120.0
_NO_MODULE: Final = 3
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*:.*")
"""Matches addresses such as docker://..., oras://... or docker-archive:..."""


def software_faults(cluster: ClusterConfig) -> tuple[list[str], list[str]]:
    """Returns faults and warnings about modules and the container."""
    faults, warnings = _modules(cluster) if cluster.kind != "local" else ([], [])  # only batch scripts load modules
    return [*_container_faults(cluster), *faults], [*_container_warnings(cluster), *warnings]


def is_address(image: str) -> bool:
    """Returns whether `image` is an address from which Apptainer fetches the image, rather than a path."""
    return _ADDRESS.fullmatch(image) is not None


def _modules(cluster: ClusterConfig) -> tuple[list[str], list[str]]:
    """Loads the modules in the order of a batch job, because one module may make the next available. Returns faults and
    warnings."""
    if not cluster.modules:
        return [], []
    try:
        done = subprocess.run(
            ["bash", str(CHECK), *cluster.modules],
            env={**os.environ, **cluster.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return [], [f"cluster.modules: could not be checked: no answer within {TIMEOUT_S:g} s"]
    except OSError as error:
        return [], [f"cluster.modules: could not be checked: {error}"]
    if done.returncode == 0:
        return [], []
    place, *message = done.stdout.splitlines()[:3] or [""]
    if done.returncode == _NO_MODULE or not place.isdecimal():
        return [], ["cluster.modules: could not be checked: this machine has no `module` command"]
    name, what = cluster.modules[int(place)], " ".join(" ".join(message).split()) or "no reason given"
    hint = "`module avail` lists the modules; load one that only nodes have in cluster.setup"
    return [f"cluster.modules[{place}]={name}: does not load: {what} ({hint})"], []


def _container_faults(cluster: ClusterConfig) -> Iterator[str]:
    image = cluster.container.image
    if image is not None and not is_address(image) and not Path(image).expanduser().exists():
        valid = "a .sif file, a folder, or an address such as docker://..."
        yield f"cluster.container.image={image}: no such file (valid: {valid})"
    if image is not None and cluster.kind == "local" and not _has_program(cluster):
        program = cluster.container.program
        yield f"cluster.container.program={program}: not on the PATH here (valid: apptainer or singularity, or a path)"


def _has_program(cluster: ClusterConfig) -> bool:
    """Returns whether the program that starts containers is on the PATH that the engines get."""
    return shutil.which(cluster.container.program, path=cluster.env.get("PATH")) is not None


def _container_warnings(cluster: ClusterConfig) -> Iterator[str]:
    container: ContainerConfig = cluster.container
    if container.image is None:
        return
    if cluster.kind != "local" and not _has_program(cluster):
        note = "a module may provide it" if cluster.modules else "the nodes must have it"
        yield f"cluster.container.program={container.program}: not found here; {note}"
    if is_address(container.image) and cluster.offline:
        key = f"cluster.container.image={container.image}"
        yield f"{key}: nodes are offline, but would have to fetch it (first `{container.program} pull` it to a file)"
