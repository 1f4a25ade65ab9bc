"""What `hpc-router bench soak` was asked for, and when it will strike at what. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Self

from hpc_router.bench.load.native.load import MAX_CONNECTIONS
from hpc_router.errors import ConfigError

CALM_S: Final = 5.0
"""At the end nothing is struck, so that what was struck last is back."""


class FaultTarget(StrEnum):
    REPLICA = "replica"
    WORKER = "worker"
    CONTROL = "control"


@dataclass(frozen=True, slots=True)
class Strikes:
    """At one kind of process: the first after `first_s`, then every `every_s`; None: once."""

    target: FaultTarget
    first_s: float
    every_s: float | None

    def times(self, seconds: float) -> list[float]:
        end = seconds - CALM_S
        if self.every_s is None:
            return [self.first_s] if self.first_s <= end else []
        return [at for n in range(int(seconds / self.every_s) + 1) if (at := self.first_s + n * self.every_s) <= end]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakOptions:
    """`rate`: short requests per second; `streams`: open at any time. `strikes` None: the usual ones."""

    seconds: float = 60.0
    rate: float = 100.0
    streams: int = 200
    workers: int = 2
    strikes: Sequence[Strikes] | None = None
    seed: int = 0
    out: Path

    def checked(self) -> Self:
        """Raises ConfigError."""
        if not 1 <= self.seconds <= 86_400:
            raise ConfigError(f"--seconds {self.seconds:g}: between 1 and 86400")
        if not 1 <= self.rate <= 10_000:
            raise ConfigError(f"--rate {self.rate:g}: between 1 and 10000 requests per second")
        if not 1 <= self.streams <= MAX_CONNECTIONS:
            raise ConfigError(f"--streams {self.streams}: between 1 and {MAX_CONNECTIONS} fit on one machine")
        if not 1 <= self.workers <= 64:
            raise ConfigError(f"--workers {self.workers}: between 1 and 64")
        return self

    def schedule(self) -> list[tuple[float, FaultTarget]]:
        """When what is struck, in seconds from the start of the load."""
        strikes = usual(self.seconds) if self.strikes is None else self.strikes
        return sorted((at, one.target) for one in strikes for at in one.times(self.seconds))


def usual(seconds: float) -> list[Strikes]:
    """A replica every 5 s, a worker every minute, the control process once."""
    return [
        Strikes(FaultTarget.REPLICA, 5.0, 5.0),
        Strikes(FaultTarget.WORKER, 20.0, 60.0),
        Strikes(FaultTarget.CONTROL, seconds / 2 + 2.0, None),
    ]


def strikes_of(text: str) -> Strikes | None:
    """`replica=5`, `worker=60`, `control=once`; None for `none`. Raises ConfigError."""
    if text == "none":
        return None
    name, _, every = text.partition("=")
    valid = "replica=SECONDS, worker=SECONDS, control=SECONDS, or =once; none"
    try:
        every_s = None if every == "once" else float(every)
        target = FaultTarget(name)
    except ValueError as error:
        raise ConfigError(f"--strike {text}: not understood (valid: {valid})") from error
    if every_s is not None and not every_s >= 1:
        raise ConfigError(f"--strike {text}: at most once a second (valid: {valid})")
    return Strikes(target, every_s or CALM_S, every_s)
