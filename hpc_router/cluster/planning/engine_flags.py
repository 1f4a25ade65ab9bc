"""Asks each engine's own interpreter whether it takes the flags it would get, before a job waits in vain.

Only a clear no is a fault; an interpreter that cannot be asked here may still be right on the node.
"""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from hpc_router.cluster.planning.software_checks import is_address
from hpc_router.config.adapters import adapters_of, hosts
from hpc_router.config.schema import ClusterConfig, ExpertConfig
from hpc_router.expert.engines import Place, build_engine, engine_environment
from hpc_router.expert.engines.container import command_in_container

TIMEOUT_S: Final = 120.0
_FRAME: Final = " \t│|"
"""Some parsers draw a box around what they say."""
REFUSED: Final = 2
"""The exit status of an argument parser that refuses."""


def check_flags(experts: Mapping[str, ExpertConfig], cluster: ClusterConfig) -> tuple[list[str], list[str]]:
    """Faults and warnings; equal questions are asked once, different ones at the same time."""
    with tempfile.TemporaryDirectory(prefix="hpc-router-") as folder:
        place = Place(Path(folder))
        questions: dict[tuple[str, ...], list[str]] = {}
        for name, expert in hosts(experts).items():
            command = build_engine(name, expert, adapters=adapters_of(experts, name)).check_command(place)
            if command is not None:
                questions.setdefault(_flags_alone(command, name, expert.model), []).append(name)
        if not questions:
            return [], []
        image = cluster.container.image
        if image is not None and is_address(image):
            return [], [f"the engines' options could not be checked: they are in {image}, which is not here yet"]
        with ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2) // 2)) as pool:
            first = [names[0] for names in questions.values()]
            answers = list(pool.map(lambda name: _ask(name, experts, cluster, place), first))
    faults, warnings = [], []
    for names, (status, said) in zip(questions.values(), answers, strict=True):
        at = " and ".join(f"experts.{name}.engine.options" for name in names)
        if status == REFUSED:
            faults.append(f"{at}: the engine refuses: {said}")
        elif status != 0:
            where = image or experts[names[0]].engine.python or "python"
            warnings.append(f"{at}: could not be checked with {where}: {said}")
    return faults, warnings


def _flags_alone(command: list[str], *names: str) -> tuple[str, ...]:
    """Parsers judge flags, not models: what differs only in names is one question."""
    return tuple("" if word in names else word for word in command)


def _ask(name: str, experts: Mapping[str, ExpertConfig], cluster: ClusterConfig, place: Place) -> tuple[int, str]:
    """Exit status and the last line said."""
    expert = experts[name]
    engine = build_engine(name, expert, adapters=adapters_of(experts, name))
    command = engine.check_command(place)
    assert command is not None
    environment = engine_environment(engine, expert, place, inherited=os.environ, cluster=cluster)
    environment["TMPDIR"] = os.environ.get("TMPDIR", "/tmp")  # the agent's own folder does not exist yet
    try:
        done = subprocess.run(
            command_in_container(command, cluster.container, place, expert, models=engine.models),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {TIMEOUT_S:g} s"
    except OSError as error:
        return 1, str(error)
    lines = [line.strip(_FRAME) for line in (done.stderr or done.stdout).splitlines()]
    spoken = [line for line in lines if any(map(str.isalnum, line))]
    return done.returncode, spoken[-1] if spoken else f"exit status {done.returncode}"
