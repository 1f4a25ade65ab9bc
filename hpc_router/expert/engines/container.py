"""Runs an engine's command line in the cluster's container image. Apptainer and Singularity have the same options.

The agent runs outside of the container and reaches the engine through its unix socket. The scratch folder, local models
and the scripts for the engine's interpreter are therefore mounted into the container, each at its own path.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from hpc_router.config.schema import ContainerConfig, ExpertConfig
from hpc_router.expert.engines.base import INSIDE, Place, is_local

PYTHON: Final = "python3"
"""The Python interpreter inside an image if `engine.python` is not set."""
_GPU_OPTIONS: Final = frozenset({"--nv", "--nvccli", "--rocm"})


def command_in_container(
    argv: Sequence[str], container: ContainerConfig, place: Place, expert: ExpertConfig, *, models: Sequence[str]
) -> list[str]:
    """Returns the command that runs `argv` in the container. The image's interpreter replaces the first word of `argv`.

    Returns `argv` unchanged if no image is configured, and for the simulated engine, which is part of this package.
    `models`: folders and hub ids that the engine loads.
    """
    if container.image is None or expert.engine.kind == "sim":
        return list(argv)
    return [
        *(container.program, "exec"),
        *(("--nv",) if expert.resources.gpus and not _GPU_OPTIONS & set(container.options) else ()),
        *(word for bind in _binds(container, place, models) for word in ("--bind", bind)),
        *container.options,
        container.image,
        expert.engine.python or PYTHON,
        *argv[1:],
    ]


def _binds(container: ContainerConfig, place: Place, models: Sequence[str]) -> Iterator[str]:
    """Yields the folders that are mounted into the container."""
    yield str(place.folder)
    yield f"{INSIDE}:{INSIDE}:ro"
    if place.kept_cache is not None:
        yield str(place.kept_cache)
    for model in dict.fromkeys(models):
        if model in place.copies or is_local(model):
            yield f"{place.path_of(model)}:{place.path_of(model)}:ro"
    yield from container.binds
