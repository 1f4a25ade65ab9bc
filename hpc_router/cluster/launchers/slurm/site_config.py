"""Slurm's configuration, as `scontrol show config` prints it."""

import re
from collections.abc import Mapping
from typing import Final

from hpc_router.cluster.launchers.commands import run_slurm_command

TIMEOUT_S: Final = 30.0


def ask_config() -> dict[str, str]:
    """Returns the values of Slurm's settings by name, without settings that have no value. Raises SlurmCommandError."""
    return parse_config(run_slurm_command(["scontrol", "show", "config"], timeout_s=TIMEOUT_S))


def parse_config(text: str) -> dict[str, str]:
    found = re.findall(r"^(\w+)[ \t]*=[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE)
    return {name: value for name, value in found if value != "(null)"}


def seconds(config: Mapping[str, str], name: str) -> int | None:
    """Returns the seconds in a setting such as `MinJobAge = 300 sec`; None if the setting is missing or no number."""
    match = re.match(r"\d+", config.get(name, ""))
    return int(match[0]) if match else None
