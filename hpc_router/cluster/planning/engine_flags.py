"""Asks each engine's own interpreter whether it accepts the engine's flags, before a job waits in the queue.

Only a refusal by the engine's argument parser is a fault. If an interpreter cannot be started on this machine, that is
a warning, because it may work on the node.
"""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from hpc_router.cluster.planning.software_checks import is_address
from hpc_router.config.schema import ClusterConfig, ExpertConfig
from hpc_router.expert.engines import Engine, Place, engine_environment
from hpc_router.expert.engines.container import command_in_container

TIMEOUT_S: Final = 120.0
_FRAME: Final = " \t│|"
"""Characters of the boxes that some argument parsers draw around their messages."""
REFUSED: Final = 2
"""Exit status of an argument parser that refuses a flag."""


def check_flags(
    engines: Mapping[str, Engine], experts: Mapping[str, ExpertConfig], cluster: ClusterConfig
) -> tuple[list[str], list[str]]:
    """Returns faults and warnings about the flags of these engines. Engines with the same command are checked once, and
    different commands run in parallel."""
    with tempfile.TemporaryDirectory(prefix="hpc-router-") as folder:
        place = Place(Path(folder))
        commands = {name: engine.check_command(place) for name, engine in engines.items()}
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, command in commands.items():
            if command is not None:
                alike.setdefault(_without_names(command, name, experts[name].model), []).append(name)
        if not alike:
            return [], []
        image = cluster.container.image
        if image is not None and is_address(image):
            return [], [f"the engines' options could not be checked: they are in {image}, which is not here yet"]

        def check(name: str) -> tuple[int, str]:
            return _run(commands[name] or [], engines[name], experts[name], cluster, place)

        with ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2) // 2)) as pool:
            results = list(pool.map(check, [names[0] for names in alike.values()]))
    faults, warnings = [], []
    for names, (status, message) in zip(alike.values(), results, strict=True):
        at = " and ".join(f"experts.{name}.engine.options" for name in names)
        if status == REFUSED:
            faults.append(f"{at}: the engine refuses: {message}")
        elif status != 0:
            where = image or experts[names[0]].engine.python or "python"
            warnings.append(f"{at}: could not be checked with {where}: {message}")
    return faults, warnings


def _without_names(command: list[str], *names: str) -> tuple[str, ...]:
    """Returns the command with an empty word in place of each of `names`. Commands that differ only in names are then
    equal and checked once."""
    return tuple("" if word in names else word for word in command)


def _run(
    command: list[str], engine: Engine, expert: ExpertConfig, cluster: ClusterConfig, place: Place
) -> tuple[int, str]:
    """Runs `command`, which checks the engine's flags. Returns its exit status and the last line of its output."""
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
    messages = [line for line in lines if any(map(str.isalnum, line))]
    return done.returncode, messages[-1] if messages else f"exit status {done.returncode}"
