"""Asks each engine's own interpreter whether it takes the flags it would get, before a job waits in vain.

Only a clear no is a fault; an interpreter that cannot be asked here may still be right on the node.
"""

import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from hpc_router.config import ExpertConfig
from hpc_router.expert.engines import Place, build_engine, engine_environment

TIMEOUT_S: Final = 120.0
_FRAME: Final = " \t│|"
"""Some parsers draw a box around what they say."""
REFUSED: Final = 2
"""The exit status of an argument parser that refuses."""


def check_flags(experts: Mapping[str, ExpertConfig]) -> tuple[list[str], list[str]]:
    """Faults and warnings; equal questions are asked once, different ones at the same time."""
    questions: dict[tuple[str, ...], list[str]] = {}
    for name, expert in experts.items():
        command = build_engine(name, expert).check_command(_PLACE)
        if command is not None:
            questions.setdefault(_flags_alone(command, name, expert.model), []).append(name)
    if not questions:
        return [], []
    with ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2) // 2)) as pool:
        answers = list(pool.map(lambda names: _ask(names[0], experts[names[0]]), questions.values()))
    faults, warnings = [], []
    for names, (status, said) in zip(questions.values(), answers, strict=True):
        at = " and ".join(f"experts.{name}.engine.options" for name in names)
        if status == REFUSED:
            faults.append(f"{at}: the engine refuses: {said}")
        elif status != 0:
            warnings.append(f"{at}: could not be checked with {experts[names[0]].engine.python or 'python'}: {said}")
    return faults, warnings


_PLACE: Final = Place(Path("/tmp/hpc-router-check"))


def _flags_alone(command: list[str], *names: str) -> tuple[str, ...]:
    """Parsers judge flags, not models: what differs only in names is one question."""
    return tuple("" if word in names else word for word in command)


def _ask(name: str, expert: ExpertConfig) -> tuple[int, str]:
    """Exit status and the last line said."""
    engine = build_engine(name, expert)
    command = engine.check_command(_PLACE)
    assert command is not None
    environment = engine_environment(engine, expert, _PLACE, inherited=os.environ)
    environment["TMPDIR"] = os.environ.get("TMPDIR", "/tmp")  # the agent's own folder does not exist yet
    try:
        done = subprocess.run(
            command,
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
