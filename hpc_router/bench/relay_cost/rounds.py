"""The order of the measurements: each round measures every relay once, and each round starts with another relay.

Changes of the machine's speed therefore affect all relays alike. Each measurement starts a new engine and a new relay.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_router.bench.load.native.engine import mock_engine
from hpc_router.bench.relay_cost.interface import Relay, RelayPlacement
from hpc_router.bench.relay_cost.measurements import Measurement, Round
from hpc_router.bench.relay_cost.options import RelayCostOptions
from hpc_router.bench.relay_cost.processes import Cores, pinned_to
from hpc_router.errors import LaunchError

ShowStep = Callable[[str], None]
"""A function that displays the current step."""


@dataclass(slots=True)
class RelayRounds:
    """All rounds of one relay. `broken`: the errors of rounds that could not be measured. `soak`: pairs (requests sent
    so far, private memory in MiB) of the memory soak."""

    relay: Relay
    version: str
    rounds: dict[int, Round] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    soak: list[tuple[int, float]] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Returns the number of failed rounds, requests and streams."""
        return len(self.broken) + sum(sum(one.failed.values()) for one in self.rounds.values())


def measure_all(found: Sequence[RelayRounds], options: RelayCostOptions, cores: Cores, show: ShowStep) -> None:
    """Adds the figures of all rounds to `found`. An interrupt (KeyboardInterrupt) leaves there what was measured."""
    # The name is short, because the length of a unix socket's path is limited.
    with tempfile.TemporaryDirectory(prefix="hr-bench-", ignore_cleanup_errors=True) as name, pinned_to(cores.load):
        folder = Path(name)
        for number in range(options.rounds):
            first = number % len(found)
            for measured in (*found[first:], *found[:first]):
                _measure(measured, options, cores, folder, show, number=number)
        if options.soak:
            for measured in found:
                if measured.relay.name == "router":
                    _measure(measured, options, cores, folder, show, number=None)


def _measure(
    measured: RelayRounds, options: RelayCostOptions, cores: Cores, folder: Path, show: ShowStep, *, number: int | None
) -> None:
    """Adds the figures of round `number` of a relay to `measured`; without a number, measures how its memory grows."""
    relay = measured.relay
    label = f"{'soak' if number is None else f'round {number + 1} of {options.rounds}'}, {relay.name}"
    place = folder / relay.name
    place.mkdir()
    try:
        with mock_engine(place, rate=options.rate, socket=place / "engine" if relay.behind_socket else None) as engine:
            show(f"{label}: starting")
            with relay.started(RelayPlacement(engine, place, cores.relay)) as started:
                measurement = Measurement(
                    options, relay, started, engine, place, cores, lambda text: show(f"{label}: {text}")
                )
                if number is None:
                    measured.soak = measurement.soak(options.soak)
                    measured.broken += [f"{what}, {count} times" for what, count in measurement.round.failed.items()]
                else:
                    measured.rounds[number] = measurement.all()
    except LaunchError as error:
        measured.broken.append(str(error))
        sys.stderr.write(f"hpc-router: {relay.name}: {error}\n")
    finally:
        shutil.rmtree(place, ignore_errors=True)
