"""Whether jobs will find what they are to use: modules, the container's image and program, their interpreter.

Looked for on the machine that plans, which sees the shared file system as the nodes do. What only the nodes may have,
such as a program, is a warning. On cluster=local this machine is all there is.
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
"""docker://..., oras://..., docker-archive:..."""


def software_faults(cluster: ClusterConfig) -> tuple[list[str], list[str]]:
    """Faults and warnings."""
    wrong, unsure = (
        _modules(cluster) if cluster.kind != "local" else ([], [])
    )  # without batch scripts nobody loads them
    return [*_container_faults(cluster), *wrong], [*_container_warnings(cluster), *unsure]


def is_address(image: str) -> bool:
    """Of an image that Apptainer fetches, rather than a path."""
    return _ADDRESS.fullmatch(image) is not None


def _modules(cluster: ClusterConfig) -> tuple[list[str], list[str]]:
    """They are loaded as a batch job will: in their order, since one may show where the next is."""
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
    place, *said = done.stdout.splitlines()[:3] or [""]
    if done.returncode == _NO_MODULE or not place.isdecimal():
        return [], ["cluster.modules: could not be checked: this machine has no `module` command"]
    name, what = cluster.modules[int(place)], " ".join(" ".join(said).split()) or "no reason given"
    hint = "`module avail` lists what there is; one that only nodes have: load it in cluster.setup"
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
    """On the PATH that engines get."""
    return shutil.which(cluster.container.program, path=cluster.env.get("PATH")) is not None


def _container_warnings(cluster: ClusterConfig) -> Iterator[str]:
    container: ContainerConfig = cluster.container
    if container.image is None:
        return
    if cluster.kind != "local" and not _has_program(cluster):
        told = "a module may bring it" if cluster.modules else "the nodes must have it"
        yield f"cluster.container.program={container.program}: not found here; {told}"
    if is_address(container.image) and cluster.offline:
        key = f"cluster.container.image={container.image}"
        yield f"{key}: nodes are offline, and it is fetched there (`{container.program} pull` it to a file before)"
