"""Selects or creates the run directory of `up`. Two simultaneous `up` commands with equal configs use the same
directory.

`--run DIR` (or $HPC_ROUTER_RUN) names the run directory. Without it, `up` completes `runs/latest` if the config of that
run is equal, and otherwise creates a new run. The config of a run is frozen: `up` refuses overrides that differ from
it, and names the keys that differ.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.cluster.planning.plan import with_absolute_paths
from hpc_router.config import compose, frozen
from hpc_router.config.schema import Deployment
from hpc_router.config.sources import parse_override
from hpc_router.errors import ConfigError
from hpc_router.state.atomic_files import create_text
from hpc_router.state.run_directory import RunDir, make_run, new_run_path, open_run, place_error, point_latest

MAX_KEYS_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class RunTarget:
    """The deployment that `up` starts, and its run directory. `path`: None for a new run in `deployment.runs`."""

    deployment: Deployment
    path: Path | None

    @property
    def run(self) -> RunDir | None:
        """Returns the run directory if it exists and has a config, else None."""
        return RunDir(self.path.resolve()) if self.path is not None and (self.path / "config.yaml").exists() else None

    @property
    def planned(self) -> RunDir | None:
        """Returns the run directory, even if it does not exist yet; None for a new run in `deployment.runs`, whose name
        is not chosen yet."""
        return self.run or (RunDir(self.path.absolute()) if self.path is not None else None)

    def open(self) -> tuple[RunDir, bool]:
        """Creates the run directory if necessary and writes its config, if it has none. Returns the run, and whether
        this call created it. Raises ConfigError if the run has another config."""
        if self.path is None:
            return _new_run(self.deployment)
        made = not self.path.exists()
        try:
            run = make_run(self.path.resolve())  # resolved, because `latest` may name another run later
            frozen_now = freeze(run, self.deployment)
        except BaseException:  # also KeyboardInterrupt, so that no incomplete folder stays
            if made:
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        if not frozen_now:
            _refuse_differing(run, frozen.read(run.config), self.deployment)
        return run, made


def find_target(given: Path | None, overrides: Sequence[str], *, config_dir: Path | None = None) -> RunTarget:
    """Returns the deployment and run directory of an `up` with these arguments, without creating anything. `given`: the
    directory that `--run` names. Raises ConfigError if overrides are invalid or differ from the run's config, or if the
    folder is no run directory."""
    named = os.environ.get("HPC_ROUTER_RUN")
    path = given or (Path(named) if named else None)
    if path is not None and (path / "config.yaml").exists():
        run = open_run(path)
        base = frozen.read(run.config)
        if overrides or config_dir is not None:
            _refuse_differing(run, base, with_requested(base, overrides, config_dir=config_dir))
        return RunTarget(base, path)
    if path is not None and (problem := place_error(path.absolute())) is not None:
        raise ConfigError(f"--run {path}: {problem}")
    deployment = with_absolute_paths(compose.load_deployment(overrides, config_dir=config_dir))
    if path is not None:
        if path.exists() and any(path.iterdir()):
            open_run(path)  # raises ConfigError for a folder that is not a run directory
        return RunTarget(deployment, path)
    latest = Path(deployment.runs) / "latest"
    return RunTarget(deployment, latest if _has_config(latest, deployment) else None)


def with_requested(base: Deployment, overrides: Sequence[str], *, config_dir: Path | None = None) -> Deployment:
    """Returns the deployment that the arguments request for a run whose config is `base`. If an override chooses a file
    of a config group, or if `config_dir` is given, the result is a new config without values of `base`, and the caller
    compares the two. Otherwise the result is `base` with single values changed."""
    if config_dir is not None or any(parse_override(text).key_or_group in frozen.GROUPS for text in overrides):
        return with_absolute_paths(compose.load_deployment(overrides, config_dir=config_dir))
    return with_absolute_paths(compose.with_overrides(base, overrides))


def freeze(run: RunDir, deployment: Deployment) -> bool:
    """Writes the run's `config.yaml`. Returns False, and writes nothing, if the file exists."""
    return create_text(run.config, frozen.to_yaml(deployment))


def latest_of(runs: Path) -> str | None:
    """Returns the name of the run to which the link `latest` in `runs` points; None if there is no such link."""
    try:
        return str((runs / "latest").readlink())
    except OSError:
        return None


def discard(run: RunDir, *, before: str | None) -> None:
    """Removes a run that could not be started. If the link `latest` points to it, the link is set to the run `before`,
    or removed if that run does not exist."""
    runs = run.path.parent
    if latest_of(runs) == run.path.name:
        if before is not None and (runs / before).is_dir():
            point_latest(runs, RunDir(runs / before))
        else:
            (runs / "latest").unlink(missing_ok=True)
    shutil.rmtree(run.path, ignore_errors=True)
    with suppress(OSError):
        runs.rmdir()  # fails unless it is empty


def _new_run(deployment: Deployment) -> tuple[RunDir, bool]:
    """Creates a run and makes it `latest`. Returns the run and True. If another `up` with an equal config was faster,
    returns the run of that `up` and False."""
    runs, text = Path(deployment.runs), frozen.to_yaml(deployment)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = new_run_path(runs, deployment.name)
    try:
        run = make_run(path)
        create_text(run.config, text)
        other = _claim_latest(run, deployment, digest=digest)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    if other is None:
        return run, True
    shutil.rmtree(path)
    return other, False


def _claim_latest(run: RunDir, deployment: Deployment, *, digest: str) -> RunDir | None:
    """Makes the link `latest` point to the run and returns None. If another `up` with an equal config was faster,
    returns the run of that `up`. `digest`: hash of the config."""
    claim = run.path.parent / f".new-{digest}"
    while True:
        try:
            claim.symlink_to(run.path.name)
        except FileExistsError:
            with suppress(OSError):
                other = claim.parent / claim.readlink()
                if _has_config(other, deployment):
                    return RunDir(other)
                claim.unlink()  # a process that died has left the claim
            continue
        try:
            latest = claim.parent / "latest"
            if _has_config(latest, deployment):  # created by another `up` before the claim
                return RunDir(latest.resolve())
            point_latest(claim.parent, run)
            return None
        finally:
            claim.unlink(missing_ok=True)


def _has_config(path: Path, deployment: Deployment) -> bool:
    try:
        return frozen.read(open_run(path).config) == deployment
    except ConfigError:
        return False


def _refuse_differing(run: RunDir, base: Deployment, asked: Deployment) -> None:
    keys = frozen.differing_keys(base, asked)
    if keys:
        more = f" and {len(keys) - MAX_KEYS_SHOWN} more" if len(keys) > MAX_KEYS_SHOWN else ""
        raise ConfigError(
            f"the config of {run.path} is frozen and differs in {', '.join(keys[:MAX_KEYS_SHOWN])}{more}; leave the "
            "overrides out to complete that run or --run out for a new one; `hpc-router apply` changes the config, "
            "`hpc-router scale` replica counts"
        )
