"""CPU time that relay, engine and load generator spend between two moments of a load."""

import time
from dataclasses import dataclass
from typing import Final

from hpc_router.bench.load.native.load import Running
from hpc_router.bench.relay_cost.processes import Cores, ProcessGroup, busy_ns, cpu_ns

QUIET: Final = 0.05
"""Of the cores, what others may use."""
LOOK_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Reading:
    """What was spent until now. `core_ns`: by everything on the relay's core; `load_core_ns`: on the others' cores."""

    at_ns: int
    relay_ns: int
    engine_ns: int
    load_ns: int
    core_ns: int
    load_core_ns: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Between two readings."""

    begin: Reading
    end: Reading

    @property
    def elapsed_ns(self) -> int:
        return self.end.at_ns - self.begin.at_ns

    @property
    def relay_ns(self) -> int:
        return self.end.relay_ns - self.begin.relay_ns

    @property
    def relay_share(self) -> float:
        """Of its core."""
        return self.relay_ns / self.elapsed_ns

    @property
    def others_share(self) -> float:
        """Of the relay's core: what everything else on this machine took of it."""
        return max(0.0, (self.end.core_ns - self.begin.core_ns - self.relay_ns) / self.elapsed_ns)

    @property
    def load_others_share(self) -> float:
        """The same of the cores of load generator and engine, in cores."""
        own_ns = self.end.engine_ns + self.end.load_ns - self.begin.engine_ns - self.begin.load_ns
        return max(0.0, (self.end.load_core_ns - self.begin.load_core_ns - own_ns) / self.elapsed_ns)

    def shares(self, count: int) -> dict[str, float]:
        """In microseconds, divided by what was done meanwhile; how full the relay's core was."""
        each = max(1, count) * 1e3
        return {
            "us": self.relay_ns / each,
            "engine_us": (self.end.engine_ns - self.begin.engine_ns) / each,
            "load_us": (self.end.load_ns - self.begin.load_ns) / each,
            "per_s": count / self.elapsed_ns * 1e9,
            "relay_share": self.relay_share,
            "others_share": self.others_share,
            "load_others_share": self.load_others_share,
        }


@dataclass(frozen=True, slots=True)
class Meter:
    """Reads them all. `relay` is None where there is none."""

    relay: ProcessGroup | None
    engine_pid: int
    cores: Cores

    def over(self, load: Running, *, after_s: float, span_s: float) -> Cost:
        """From `after_s` after the load's begin, for `span_s`. It sleeps meanwhile."""
        _sleep_until(load.begun_ns + int(after_s * 1e9))
        begin = self._read(load)
        _sleep_until(begin.at_ns + int(span_s * 1e9))
        return Cost(begin, self._read(load))

    def _read(self, load: Running) -> Reading:
        relay_ns = self.relay.cpu_ns() if self.relay else 0
        spent_ns = cpu_ns(self.engine_pid), cpu_ns(load.process.pid)
        return Reading(time.monotonic_ns(), relay_ns, *spent_ns, busy_ns(self.cores.relay), busy_ns(self.cores.load))


def await_quiet(cores: Cores, *, limit_s: float) -> None:
    """Until, with our own load at rest, hardly anything runs on these cores; no longer than the limit."""
    both = cores.relay | cores.load
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        busy, at = busy_ns(both), time.monotonic_ns()
        time.sleep(LOOK_S)
        if busy_ns(both) - busy < QUIET * (time.monotonic_ns() - at) * len(both):
            return


def _sleep_until(at_ns: int) -> None:
    while (left_ns := at_ns - time.monotonic_ns()) > 0:
        time.sleep(left_ns / 1e9)
