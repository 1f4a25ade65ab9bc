"""The options of `hpc-router bench soak`, and the schedule of its kills. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Self

from hpc_router.bench.load.native.load import MAX_CONNECTIONS
from hpc_router.errors import ConfigError

FAULT_FREE_S: Final = 5.0
"""Time in seconds without faults at the end, in which the last killed process is replaced."""


class FaultTarget(StrEnum):
    """The kind of process that a fault kills."""

    REPLICA = "replica"
    WORKER = "worker"
    CONTROL = "control"


@dataclass(frozen=True, slots=True)
class KillSchedule:
    """The kills of one kind of process: the first after `first_s`, then one every `every_s` (None: only the first)."""

    target: FaultTarget
    first_s: float
    every_s: float | None

    def times(self, seconds: float) -> list[float]:
        """Returns the times of the kills, in seconds from the start of a load that lasts `seconds`. There are none in
        its last FAULT_FREE_S seconds."""
        end = seconds - FAULT_FREE_S
        if self.every_s is None:
            return [self.first_s] if self.first_s <= end else []
        return [at for n in range(int(seconds / self.every_s) + 1) if (at := self.first_s + n * self.every_s) <= end]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakOptions:
    """The options of the soak. `rate`: short requests per second. `streams`: number of open streams. `faults`: the
    schedules of the kills; None: the default ones."""

    seconds: float = 60.0
    rate: float = 100.0
    streams: int = 200
    workers: int = 2
    faults: Sequence[KillSchedule] | None = None
    seed: int = 0
    out: Path

    def checked(self) -> Self:
        """Returns the options if they are valid, else raises ConfigError."""
        limits = {"seconds": 86_400, "rate": 10_000, "streams": MAX_CONNECTIONS, "workers": 64}
        for name, high in limits.items():
            if not 1 <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"--{name} {value:g}: between 1 and {high}")
        return self

    def schedule(self) -> list[tuple[float, FaultTarget]]:
        """Returns all faults by time, as pairs (seconds from the start of the load, kind of process to kill)."""
        faults = default_faults(self.seconds) if self.faults is None else self.faults
        return sorted((at, one.target) for one in faults for at in one.times(self.seconds))


def default_faults(seconds: float) -> list[KillSchedule]:
    """Returns the default faults of a load that lasts `seconds`: a replica is killed every 5 s, a worker every minute,
    the control process once."""
    return [
        KillSchedule(FaultTarget.REPLICA, 5.0, 5.0),
        KillSchedule(FaultTarget.WORKER, 20.0, 60.0),
        KillSchedule(FaultTarget.CONTROL, seconds / 2 + 2.0, None),
    ]


def parse_fault(text: str) -> KillSchedule | None:
    """Returns the schedule in a word such as `replica=5` (kill a replica every 5 s), `worker=60` or `control=once`;
    None for `none`. Raises ConfigError."""
    if text == "none":
        return None
    name, _, every = text.partition("=")
    valid = "replica=SECONDS, worker=SECONDS, control=SECONDS, or =once; none"
    try:
        every_s = None if every == "once" else float(every)
        target = FaultTarget(name)
    except ValueError as error:
        raise ConfigError(f"--strike {text}: invalid (valid: {valid})") from error
    if every_s is not None and not every_s >= 1:
        raise ConfigError(f"--strike {text}: SECONDS must be at least 1 (valid: {valid})")
    return KillSchedule(target, every_s or FAULT_FREE_S, every_s)
