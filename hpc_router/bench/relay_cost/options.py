"""What `hpc-router bench router` was asked for, and what it refuses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from hpc_router.bench.load.native.load import MAX_CONNECTIONS
from hpc_router.errors import ConfigError

LOWER: Final = 4
"""Two hops do not fit on a core at the full rate: they are measured at this part of it, and one hop beside them."""

QUICK: Final[Mapping[str, Any]] = {"streams": 50, "seconds": 0.3, "rounds": 1, "connections": 4}
"""Enough to see that everything works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayCostOptions:
    only: tuple[str, ...] = ()
    streams: int = 1000
    rate: float = 40.0
    seconds: float = 5.0
    rounds: int = 3
    connections: int = 16
    soak: int = 0
    quiet_s: float = 0.0  # so long each measurement may wait until nothing else runs
    peers: Path | None = None
    trees: Mapping[str, Path] = field(default_factory=dict)  # other checkouts of this router, by name
    out: Path
    quick: bool = False

    def checked(self) -> Self:
        """Raises ConfigError."""
        for name, value in (("streams", self.streams), ("connections", self.connections)):
            if not 1 <= value <= MAX_CONNECTIONS:
                raise ConfigError(f"--{name} {value}: between 1 and {MAX_CONNECTIONS} fit on one machine")
        if not 0.1 <= self.rate <= 1000:
            raise ConfigError(f"--rate {self.rate:g}: between 0.1 and 1000 events per second and stream")
        if not 0.1 <= self.seconds <= 600:
            raise ConfigError(f"--seconds {self.seconds:g}: between 0.1 and 600")
        if not 0 <= self.quiet_s <= 600:
            raise ConfigError(f"--quiet {self.quiet_s:g}: between 0 and 600")
        if not 1 <= self.rounds <= 100:
            raise ConfigError(f"--rounds {self.rounds}: between 1 and 100")
        for name, tree in self.trees.items():
            if not (tree / "hpc_router" / "__init__.py").is_file():
                raise ConfigError(f"--tree {name}={tree}: no checkout of hpc-router")
        return self

    @property
    def asks(self) -> int:
        """Requests measured one after the other, for the time to first token."""
        return 20 if self.quick else 300

    @property
    def asked_s(self) -> float:
        """How long the time to first token is asked beside open streams."""
        return 0.2 if self.quick else 2.0

    @property
    def leavers(self) -> int:
        return 5 if self.quick else 50

    @property
    def settle_s(self) -> float:
        """After the last stream has begun, before events count."""
        return 0.1 if self.quick else 0.5
