"""Which relay is measured when. Rounds are interleaved: in each round every relay once, and each round begins with
another one, so that whatever else the machine does hits all alike. Each begins afresh: engine, relay, connections."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hpc_router.bench.load.native.engine import mock_engine
from hpc_router.bench.relay_cost.interface import Relay, RelayPlacement
from hpc_router.bench.relay_cost.measurements import Measurement, Round
from hpc_router.bench.relay_cost.options import RelayCostOptions
from hpc_router.bench.relay_cost.processes import Cores, on
from hpc_router.errors import LaunchError

Tell = Callable[[str], None]


@dataclass(slots=True)
class RelayRounds:
    """All rounds of one relay. `broken`: why a round could not be had."""

    relay: Relay
    version: str
    rounds: dict[int, Round] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    soak: list[tuple[int, float]] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return len(self.broken) + sum(sum(one.failed.values()) for one in self.rounds.values())


def measure_all(relays: Sequence[Relay], options: RelayCostOptions, cores: Cores, tell: Tell) -> list[RelayRounds]:
    found = [RelayRounds(relay, relay.version()) for relay in relays]
    with private_folder() as folder, on(cores.load):
        for number in range(options.rounds):
            turn = number % len(found)
            for measured in found[turn:] + found[:turn]:
                _one(measured, options, cores, folder, tell, number=number)
        if options.soak:
            for measured in found:
                if measured.relay.name == "router":
                    _one(measured, options, cores, folder, tell, number=None)
    return found


def _one(
    measured: RelayRounds, options: RelayCostOptions, cores: Cores, folder: Path, tell: Tell, *, number: int | None
) -> None:
    """A round; the soak where it has no number."""
    relay = measured.relay
    where = "soak" if number is None else f"round {number + 1} of {options.rounds}"
    place = folder / relay.name
    place.mkdir()
    try:
        with mock_engine(place, rate=options.rate, socket=place / "engine" if relay.behind_socket else None) as engine:
            tell(f"{where}, {relay.name}: starting")
            with relay.started(RelayPlacement(engine, place, cores.relay)) as started:
                told = Measurement(
                    options, relay, started, engine, place, cores, partial(_tell, tell, where, relay.name)
                )
                if number is None:
                    measured.soak = told.soak(options.soak)
                    measured.broken += [f"{what}, {count} times" for what, count in told.round.failed.items()]
                else:
                    measured.rounds[number] = told.all()
    except LaunchError as error:
        measured.broken.append(str(error))
        sys.stderr.write(f"hpc-router: {relay.name}: {error}\n")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _tell(tell: Tell, where: str, name: str, text: str) -> None:
    tell(f"{where}, {name}: {text}")


@contextmanager
def private_folder() -> Iterator[Path]:
    """For sockets, configurations, tokens and records; short, as a socket's path must be."""
    with tempfile.TemporaryDirectory(prefix="hr-bench-", ignore_cleanup_errors=True) as made:
        yield Path(made)
