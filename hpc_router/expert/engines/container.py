"""An engine's command line inside the cluster's container image: Apptainer, or Singularity, which takes the same words.

The agent stays outside and reaches the engine through its unix socket, so the scratch folder is bound into the
container at its own path, and so are local models and the scripts of ours that run in the engine's interpreter.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from hpc_router.config.schema import ContainerConfig, ExpertConfig
from hpc_router.expert.engines.base import INSIDE, Place, is_local

PYTHON: Final = "python3"
"""The interpreter inside an image, where `engine.python` names none."""
_GPU_OPTIONS: Final = frozenset({"--nv", "--nvccli", "--rocm"})


def contained(
    argv: Sequence[str], container: ContainerConfig, place: Place, expert: ExpertConfig, *, models: Sequence[str]
) -> list[str]:
    """`argv` as it is without an image, and for the simulated engine, which is ours. Its first word, the interpreter,
    is the image's. `models`: what the engine loads."""
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
    yield str(place.folder)
    yield f"{INSIDE}:{INSIDE}:ro"
    for model in dict.fromkeys(filter(is_local, models)):
        yield f"{model}:{model}:ro"
    yield from container.binds
