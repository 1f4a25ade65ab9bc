"""Code of all entry points: the command line with Hydra's flags (`-m`, `--cfg job`, `--help`), errors, exit status.

Without such flags, this package composes and checks the config, so that every invalid value gives a one-line message
and status 2. With a flag, Hydra runs first and calls the entry point once per job of a sweep. Keys that are not part of
the deployment's config (`run=DIR`) belong to the entry point.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hpc_router.cli import INTERRUPTED
from hpc_router.cli.main import run_reporting_errors
from hpc_router.config.compose import conf_folder, hydra_overrides, user_folder
from hpc_router.config.sources import parse_override
from hpc_router.errors import ConfigError, LaunchError, suggest


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call: overrides of the deployment's config, and the entry point's own keys."""

    overrides: Sequence[str]
    own: Mapping[str, str] = field(default_factory=dict)
    config_dir: Path | None = None

    def path(self, key: str) -> Path | None:
        return Path(self.own[key]) if key in self.own else None

    def required(self, key: str) -> str:
        if not self.own.get(key):
            raise ConfigError(f"{key}=... is missing: this entry point requires it")
        return self.own[key]


def launch(
    body: Callable[[Call], int],
    *,
    own: Sequence[str],
    words: list[str] | None = None,
    swept: Callable[[Call], int] | None = None,
) -> int:
    """Runs the entry point `body` and returns the exit status.

    `own`: the entry point's own keys. `words`: the command line, by default that of this process. `swept`: called once
    at the end of a sweep, with the arguments that all its jobs share.
    """
    given = sys.argv[1:] if words is None else words
    flags = get_args_parser().parse_intermixed_args(given)
    config_dir = Path(flags.config_dir) if flags.config_dir else None
    if not _wants_hydra(flags):
        return run_reporting_errors(lambda: body(make_call(flags.overrides, own=own, config_dir=config_dir)))
    status = run_reporting_errors(lambda: _through_hydra(body, given, flags.overrides, own=own, config_dir=config_dir))
    if swept is None or status not in (0, 1) or not flags.multirun or _only_prints(flags):
        return status
    return max(status, run_reporting_errors(lambda: swept(make_call(flags.overrides, own=own, config_dir=config_dir))))


def make_call(overrides: Sequence[str], *, own: Sequence[str], config_dir: Path | None = None) -> Call:
    rest, mine = [], {}
    for text in overrides:
        override = parse_override(text)
        if override.key_or_group in own:
            mine[override.key_or_group] = str(override.value())
        else:
            rest.append(text)
    return Call(rest, mine, config_dir)


def _wants_hydra(flags: Any) -> bool:
    refused = [f"--{n.replace('_', '-')}" for n in ("config_name", "config_path") if getattr(flags, n)]
    if refused:
        sys.stderr.write(f"hpc-router: {refused[0]} is not taken here{suggest(refused[0], ['--config-dir'])}\n")
        sys.exit(2)
    return flags.multirun or _only_prints(flags)


def _only_prints(flags: Any) -> bool:
    """Returns whether a flag makes Hydra print something instead of running the job."""
    names = ("cfg", "info", "help", "hydra_help", "version", "shell_completion")
    return any(getattr(flags, name, None) for name in names)


def _through_hydra(
    body: Callable[[Call], int],
    words: Sequence[str],
    overrides: Sequence[str],
    *,
    own: Sequence[str],
    config_dir: Path | None,
) -> int:
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="deploy")
    def job(_config: DictConfig) -> None:
        task = [text.removeprefix("++") for text in HydraConfig.get().overrides.task]
        with _hydra_released():
            status = run_reporting_errors(lambda: body(make_call(task, own=own, config_dir=config_dir)))
        if status == INTERRUPTED:
            raise KeyboardInterrupt  # ends the sweep: its remaining jobs are not started
        if status and "SUBMITIT_EXECUTOR" in os.environ:
            logs = Path(HydraConfig.get().sweep.dir).absolute() / ".submitit"
            # Without an exception submitit would count the job as successful.
            raise LaunchError(f"a job of the sweep ended with status {status}; its output is in {logs}")
        statuses.append(status)

    flags = _without_config_dir([word for word in words if word not in overrides])
    before = sys.argv
    sys.argv = [sys.argv[0], *flags, *hydra_overrides(overrides), f"hydra.job.name=launch.{body.__name__}"]
    try:
        with user_folder(config_dir):
            job()
    finally:
        sys.argv = before
    return max(statuses, default=0)


@contextmanager
def _hydra_released() -> Iterator[None]:
    """Clears Hydra's global state in the block, so that the entry point can compose a config inside a Hydra job."""
    instance = GlobalHydra.instance()
    before = instance.hydra
    instance.hydra = None
    try:
        yield
    finally:
        instance.hydra = before


def _without_config_dir(words: Sequence[str]) -> list[str]:
    """Removes `--config-dir`: `user_folder` puts that folder first in the search path, Hydra would put it last."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and not word.startswith(("--config-dir=", "-cd=")) and word not in ("--config-dir", "-cd"):
            kept.append(word)
        skip = word in ("--config-dir", "-cd")
    return kept
