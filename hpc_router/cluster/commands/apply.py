"""Changes the config of a running deployment and replaces its jobs one after the other, without an interruption.

Before anything changes, the new config gets the checks of `plan`. Then `config.yaml` is replaced, its predecessor is
kept as `config.previous.yaml`, and the control loop rolls the change out. Where two jobs can run at once, a job is
replaced when its successor is ready. The rollout stops at the first expert whose successor fails; the old job serves
on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import hpc_router
from hpc_router.cluster.commands.up import train_classifier
from hpc_router.cluster.control_loop.desired_state import want_config
from hpc_router.cluster.control_loop.loop import ControlLoop, LoopPass
from hpc_router.cluster.control_loop.reconcile import DEPENDENCY, rollout_failure
from hpc_router.cluster.control_loop.rolling import is_outdated
from hpc_router.cluster.control_loop.slots import Attempt, all_attempts
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.planning.plan import make_plan
from hpc_router.cluster.planning.run_target import with_requested
from hpc_router.cluster.planning.share_claim import claim_share
from hpc_router.cluster.signals import Interrupted, explaining_interrupt, interrupt_event
from hpc_router.config import frozen
from hpc_router.config.adapters import hosts
from hpc_router.config.revision import revisions
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.router.settings import settings_in, with_settings
from hpc_router.state.atomic_files import replace_text
from hpc_router.state.exclusive import exclusive
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import stamp_at

POLL_S: Final = 0.5
GOES_ON: Final = "the config is changed, and the control loop goes on with the rollout; `hpc-router status` shows it"
_FIXED: Final[Mapping[str, str]] = {
    "name": "it is part of the run's and its jobs' names",
    "runs": "it is where the run directory is",
    "cluster.kind": "the jobs run there",
    "router.place": "the router runs there",
}
"""Keys that `apply` cannot change, each with the reason."""


@dataclass(frozen=True, slots=True)
class Change:
    """A checked change of a run's config from `before` to `after`. `keys`: the keys that differ, each with the old and
    the new value. `replaced`: the names of the experts, and `router`, whose jobs are replaced. `settings`: the values
    set by `hpc-router set`; the new config's value replaces a setting whose key is in `keys`."""

    run: RunDir
    before: Deployment
    after: Deployment
    keys: Mapping[str, tuple[Any, Any]]
    replaced: Sequence[str]
    settings: Mapping[str, Any]

    def kept_settings(self) -> dict[str, Any]:
        """Returns the settings that remain: those whose key is not in `keys`."""
        return {key: value for key, value in self.settings.items() if key not in self.keys}

    def _is_kept(self, key: str) -> bool:
        """Returns whether `key` belongs to no expert that the change adds or removes."""
        changed = self.before.experts.keys() ^ self.after.experts.keys()
        return not any(key.startswith(f"experts.{name}.") for name in changed)

    def to_json(self) -> dict[str, Any]:
        return {
            "keys": {key: {"before": was, "after": now} for key, (was, now) in self.keys.items()},
            "replaced": list(self.replaced),
        }

    def lines(self) -> list[str]:
        """Returns a description of the change for the user, as lines of text."""
        old, new = hosts(self.before.experts), hosts(self.after.experts)
        return [
            *(f"{key}: {_text(was)} -> {_text(now)}" for key, (was, now) in self.keys.items() if self._is_kept(key)),
            *(
                f"{key}: the setting {_text(value)} of `hpc-router set` ends"
                for key, value in self.settings.items()
                if key in self.keys
            ),
            *(f"{name} is added" for name in sorted(new.keys() - old.keys())),
            *(f"{name} is removed: its replicas drain" for name in sorted(old.keys() - new.keys())),
            *(f"{name}: each of its jobs is replaced" for name in self.replaced),
            *([] if self.replaced or not self.keys else ["no job is replaced"]),
            *([] if self.keys else [f"jobs of other versions than hpc-router {hpc_router.__version__} are replaced"]),
        ]


def find_change(run: RunDir, overrides: Sequence[str], *, config_dir: Path | None, previous: bool = False) -> Change:
    """Returns the change that `overrides` make, if it passes the checks of `plan`. `previous`: whether the overrides
    apply to the config before the last `apply` instead of the present one. Without overrides, `config_dir` and
    `previous`, the change only moves the run to this version of the package. Raises ConfigError if the new config is
    invalid or a value of `hpc-router set` does not fit it, if a key cannot change, or if nothing changes."""
    before = frozen.read(run.config)
    base = frozen.read(run.previous_config) if previous else before
    after = with_requested(base, overrides, config_dir=config_dir)
    differing = frozen.differing_values(before, after)
    keys = {key: values for key, values in differing.items() if any(value not in (None, {}) for value in values)}
    fixed = [
        f"{key} cannot change: {_FIXED[key]}; `hpc-router up` with it starts a new run" for key in keys if key in _FIXED
    ]
    if fixed:
        raise ConfigError("\n".join(fixed))
    settings = settings_in(run.read_desired())
    if not keys and (overrides or previous or config_dir is not None):
        in_force = "".join(
            f"; {key} is set to {_text(value)} at present: `hpc-router set {key}=` restores the config's value"
            for key, value in settings.items()
        )
        raise ConfigError(f"the config of {run.path} already has these values: nothing to apply{in_force}")
    make_plan(after, run=run)
    change = Change(run, before, after, keys, _replaced(before, after), settings)
    _check_settings(change)
    return change


def _replaced(before: Deployment, after: Deployment) -> list[str]:
    """Returns the names of the experts whose jobs the change replaces, sorted; then `router` if its job is replaced."""
    old, new = revisions(before), revisions(after)
    names = [name for name in old.keys() & new.keys() if old[name] != new[name]]
    return sorted(names, key=lambda name: (name == ROUTER, name))


def _check_settings(change: Change) -> None:
    """Raises ConfigError if one of the settings that remain is invalid in the new config, because the router could then
    use none of them."""
    kept = change.kept_settings()
    for key, value in kept.items():
        try:
            with_settings(change.after, {key: value})
        except ConfigError as error:
            raise ConfigError(
                f"the setting {key}={_text(value)} does not fit the new config: {error}; "
                f"`hpc-router set {key}=` restores the config's value"
            ) from error
    with_settings(change.after, kept)


def write_change(change: Change) -> ControlLoop:
    """Replaces the run's config, and returns a control loop with the new one. From then on every control loop of the
    run replaces the outdated jobs. Raises ConfigError if another `apply` has changed the config in the meantime."""
    run = change.run
    observed = ControlLoop(run, read_only=True).preview(fresh=True).observed  # may wait for Slurm
    claim_share(run, change.after)
    with exclusive(run.config_claim):
        _check_config_is(run, change.before)
        # The config last: until then the loop ignores the wanted revisions, so an interrupted `apply` changes nothing.
        want_config(run, change.before, change.after, observed, changed=change.keys)
        replace_text(run.previous_config, frozen.to_yaml(change.before))
        replace_text(run.config, frozen.to_yaml(change.after))
    if change.before.experts != change.after.experts or change.before.policy != change.after.policy:
        train_classifier(run, change.after, replace=True)
    run.event("applied", keys=sorted(change.keys), version=hpc_router.__version__)
    _check_config_is(run, change.after)
    return ControlLoop(run, deployment=change.after)


def _check_config_is(run: RunDir, config: Deployment) -> None:
    """Raises ConfigError if the run's config is not `config`, because another `apply` has replaced it."""
    if frozen.read(run.config) != config:
        raise ConfigError(f"the config of {run.path} was changed meanwhile: look at it and apply again")


def roll_out(control: ControlLoop, show: Callable[[str], None]) -> None:
    """Runs passes until every job has the new config. Calls `show` with the progress as text. Raises LaunchError if the
    rollout stops, ConfigError if another `apply` replaces the config, and Interrupted after Ctrl-C.

    The loop in the router's job may run passes at the same time. It runs none if that job has an older version of the
    package, so passes are run here as well.
    """
    shown, checked = "", None
    with interrupt_event() as interrupted, explaining_interrupt(lambda: GOES_ON):
        while not interrupted.is_set():
            if (stamp := stamp_at(control.run.config)) != checked:
                _check_config_is(control.run, control.deployment)
                checked = stamp
            seen = control.run_pass()
            if seen.desired.down:
                raise LaunchError(f"{control.run.path} was taken down by `hpc-router down` in the meantime")
            left = outdated(seen)
            text = _progress(seen, left)
            if not text:
                return
            if text != shown:
                show(text)
                shown = text
            for attempt in left:
                if (end := rollout_failure(attempt, seen.observed[attempt.slot], seen.desired)) is not None:
                    raise LaunchError(
                        f"the rollout stopped: the successor of {attempt.replica} failed: {end.message}; "
                        f"{attempt.replica} serves on; apply another value, or `hpc-router apply --previous`"
                    )
            interrupted.wait(POLL_S)
    raise Interrupted(GOES_ON)


def outdated(seen: LoopPass) -> list[Attempt]:
    """Returns the live jobs of wanted slots that were submitted with an earlier config."""
    wanted = set(seen.desired.slots())
    return [
        attempt
        for slot, attempts in sorted(seen.observed.items())
        for attempt in attempts
        if slot in wanted and attempt.live and is_outdated(attempt, seen.desired.revisions)
    ]


def _progress(seen: LoopPass, left: Sequence[Attempt]) -> str:
    """Returns a text for the user: the jobs in `left`, which have the old config, or else the slots without a ready
    job. Empty when every slot has a ready job of the new config."""
    if left:
        queued = [
            a for a in all_attempts(seen.observed) if a.live and a.report.pending_reason not in (None, DEPENDENCY)
        ]
        waits = "".join(f"; {a.replica} waits in Slurm's queue: {a.report.pending_reason}" for a in queued)
        jobs = "1 job" if len(left) == 1 else f"{len(left)} jobs"
        return f"{jobs} left with the old config: {', '.join(a.replica for a in left)}{waits}"
    waiting = [str(slot) for slot in seen.desired.slots() if not any(a.ready for a in seen.observed.get(slot, ()))]
    return f"waiting for {', '.join(waiting)}" if waiting else ""


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
