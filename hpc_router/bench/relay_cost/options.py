"""Options of `hpc-router bench router` and their valid values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from hpc_router.bench.load.native.load import MAX_CONNECTIONS
from hpc_router.errors import ConfigError

LOWER_LOAD_DIVISOR: Final = 4
"""Divisor of the number of streams for measurements with two hops, which would otherwise need more than one core. For
comparison, one hop is also measured with this number."""

QUICK: Final[Mapping[str, Any]] = {"streams": 50, "seconds": 0.3, "rounds": 1, "connections": 4}
"""Option values for a quick check that the benchmark works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayCostOptions:
    """The options of the benchmark. `rate`: events per second of each stream. `soak`: number of short requests that are
    sent to see whether the relay's memory grows. `trees`: other checkouts of this router to measure, by name."""

    only: tuple[str, ...] = ()
    streams: int = 1000
    rate: float = 40.0
    seconds: float = 5.0
    rounds: int = 3
    connections: int = 16
    soak: int = 0
    quiet_s: float = 0.0  # maximum wait, before each measurement, until other processes are idle
    environment: Path | None = None  # virtual environment with the routers from PyPI
    trees: Mapping[str, Path] = field(default_factory=dict)
    out: Path
    quick: bool = False

    def checked(self) -> Self:
        """Returns the options if they are valid, else raises ConfigError."""
        for name, value, low, high in (
            ("streams", self.streams, 1, MAX_CONNECTIONS),
            ("connections", self.connections, 1, MAX_CONNECTIONS),
            ("rate", self.rate, 0.1, 1000),
            ("seconds", self.seconds, 0.1, 600),
            ("quiet", self.quiet_s, 0, 600),
            ("rounds", self.rounds, 1, 100),
        ):
            if not low <= value <= high:
                raise ConfigError(f"--{name} {value:g}: between {low:g} and {high:g}")
        for name, tree in self.trees.items():
            if not (tree / "hpc_router" / "__init__.py").is_file():
                raise ConfigError(
                    f"--tree {name}={tree}: no checkout of hpc-router (hpc_router/__init__.py is missing)"
                )
        return self

    @property
    def first_token_requests(self) -> int:
        """Returns the number of requests with which the time to first token is measured, one after the other."""
        return 20 if self.quick else 300

    @property
    def beside_streams_s(self) -> float:
        """Returns for how many seconds the time to first token is measured while streams are open."""
        return 0.2 if self.quick else 2.0

    @property
    def disconnects(self) -> int:
        """Returns the number of streams that the client disconnects in mid-stream. The same number of further streams
        is disconnected before the first byte."""
        return 5 if self.quick else 50

    @property
    def settle_s(self) -> float:
        """Returns the pause in seconds between the start of the last stream and the measurement of events."""
        return 0.1 if self.quick else 0.5
