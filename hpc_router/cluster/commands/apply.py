"""Changes the config of a running deployment and replaces its jobs one after the other, without an interruption.

The new config is checked as `plan` does before anything changes. Then `config.yaml` is replaced, with its predecessor
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
from hpc_router.cluster.control_loop.rolling import is_outdated
from hpc_router.cluster.control_loop.slots import Attempt
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.planning.plan import make_plan
from hpc_router.cluster.planning.run_target import with_requested
from hpc_router.cluster.signals import Interrupted, explaining_interrupt, interrupt_event
from hpc_router.config import frozen
from hpc_router.config.adapters import hosts
from hpc_router.config.revision import revisions
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.state.atomic_files import replace_text
from hpc_router.state.job_records import PERMANENT, Exit
from hpc_router.state.run_directory import RunDir

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
    """A checked change of a run's config. `keys`: the keys that differ, each with the old and the new value."""

    run: RunDir
    before: Deployment
    after: Deployment
    keys: Mapping[str, tuple[Any, Any]]

    def rolled(self) -> list[str]:
        """Returns the names of the experts, and `router`, whose jobs are replaced."""
        old, new = revisions(self.before), revisions(self.after)
        names = sorted(name for name in old.keys() & new.keys() if old[name] != new[name] and name != ROUTER)
        return [*names, *([ROUTER] if old[ROUTER] != new[ROUTER] else [])]

    def _is_kept(self, key: str) -> bool:
        """Returns whether the key does not belong to an added or removed expert."""
        changed = self.before.experts.keys() ^ self.after.experts.keys()
        return not any(key.startswith(f"experts.{name}.") for name in changed)

    def to_json(self) -> dict[str, Any]:
        return {
            "keys": {key: {"before": was, "after": now} for key, (was, now) in self.keys.items()},
            "replaced": self.rolled(),
        }

    def lines(self) -> list[str]:
        """Returns the change as lines of text."""
        old, new = hosts(self.before.experts), hosts(self.after.experts)
        rolled = self.rolled()
        return [
            *(f"{key}: {_text(was)} -> {_text(now)}" for key, (was, now) in self.keys.items() if self._is_kept(key)),
            *(f"{name} is added" for name in sorted(new.keys() - old.keys())),
            *(f"{name} is removed: its replicas drain" for name in sorted(old.keys() - new.keys())),
            *(f"{name}: each of its jobs is replaced" for name in rolled),
            *([] if rolled or not self.keys else ["no job is replaced"]),
            *([] if self.keys else [f"jobs of other versions than hpc-router {hpc_router.__version__} are replaced"]),
        ]


def find_change(run: RunDir, overrides: Sequence[str], *, config_dir: Path | None, previous: bool = False) -> Change:
    """Returns the change that these overrides make, checked as `plan` does. `previous`: whether the overrides apply to
    the config before the last `apply`. If it is false and there are no overrides, the change only moves the run to this
    version of the package. Raises ConfigError for an invalid config, for a key that cannot change, and for overrides
    that change nothing."""
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
    if not keys and (overrides or previous or config_dir is not None):
        raise ConfigError(f"the config of {run.path} already has these values: nothing to apply")
    make_plan(after, run=run)
    return Change(run, before, after, keys)


def write_change(change: Change) -> ControlLoop:
    """Replaces the run's config and returns a control loop that replaces the jobs; every control loop of the run now
    does this. Raises ConfigError if another `apply` has changed the config in the meantime."""
    run = change.run
    observed = ControlLoop(run, read_only=True).preview(fresh=True).observed  # may wait for Slurm
    _check_config_is(run, change.before)
    replace_text(run.previous_config, frozen.to_yaml(change.before))
    replace_text(run.config, frozen.to_yaml(change.after))
    want_config(run, change.before, change.after, observed)
    if change.before.experts != change.after.experts or change.before.policy != change.after.policy:
        train_classifier(run, change.after, replace=True)
    run.event("applied", keys=sorted(change.keys), version=hpc_router.__version__)
    _check_config_is(run, change.after)
    return ControlLoop(run)


def _check_config_is(run: RunDir, config: Deployment) -> None:
    """Raises ConfigError if the run has another config, because another `apply` runs at the same time."""
    if frozen.read(run.config) != config:
        raise ConfigError(f"the config of {run.path} was changed meanwhile: look at it and apply again")


def roll_out(control: ControlLoop, show: Callable[[str], None]) -> None:
    """Runs passes until every job has the new config. Raises LaunchError if the rollout stops, and Interrupted after
    Ctrl-C.

    These passes may run beside the loop of the router's job, and are needed while that job runs an older version.
    """
    shown = ""
    with interrupt_event() as interrupted, explaining_interrupt(lambda: GOES_ON):
        while not interrupted.is_set():
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
                if (end := _stopped(seen, attempt)) is not None:
                    raise LaunchError(
                        f"the rollout stopped: the successor of {attempt.replica} failed: {end.message}; "
                        f"{attempt.replica} serves on; apply another value, or `hpc-router apply --previous`"
                    )
            interrupted.wait(POLL_S)
    raise Interrupted(GOES_ON)


def outdated(seen: LoopPass) -> list[Attempt]:
    """Returns the live jobs that were submitted with an earlier config."""
    wanted = set(seen.desired.slots())
    return [
        attempt
        for slot, attempts in sorted(seen.observed.items())
        for attempt in attempts
        if slot in wanted and attempt.live and is_outdated(attempt, seen.desired.revisions)
    ]


def _progress(seen: LoopPass, left: Sequence[Attempt]) -> str:
    """Returns the jobs that the rollout still waits for, as text; empty when every slot has a ready job of the new
    config."""
    if left:
        return f"{len(left)} jobs left with the old config: {', '.join(a.replica for a in left)}"
    waiting = [str(slot) for slot in seen.desired.slots() if not any(a.ready for a in seen.observed.get(slot, ()))]
    return f"waiting for {', '.join(waiting)}" if waiting else ""


def _stopped(seen: LoopPass, attempt: Attempt) -> Exit | None:
    """Returns the last failure of the attempt's successors if no further successor will be submitted; else None."""
    forgiven = seen.desired.forgiven.get(str(attempt.slot), 0)
    newer = [a for a in seen.observed[attempt.slot] if a.generation > max(attempt.generation, forgiven)]
    ends = [a.exit for a in newer if a.exit is not None and not a.exit.ok]
    if any(a.live for a in newer) or not ends:
        return None
    return ends[-1] if ends[-1].reason in PERMANENT or len(ends) >= seen.desired.max_failures else None


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
