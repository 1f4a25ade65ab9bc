"""Measures the CPU time that relay, engine and load generator use during a part of a load."""

import time
from dataclasses import dataclass
from typing import Final

from hpc_router.bench.load.native.load import Running
from hpc_router.bench.relay_cost.processes import Cores, ProcessGroup, busy_ns, cpu_ns

IDLE_SHARE: Final = 0.05
"""Load of a core, as a share, below which the core counts as idle."""
POLL_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class CpuReading:
    """The CPU time in nanoseconds that was used until `at_ns`. `core_ns`: by all processes of the machine on the
    relay's core. `load_core_ns`: by all processes on the cores of load generator and engine."""

    at_ns: int
    relay_ns: int
    engine_ns: int
    load_ns: int
    core_ns: int
    load_core_ns: int


@dataclass(frozen=True, slots=True)
class CpuCost:
    """The CPU time that was used between two readings."""

    begin: CpuReading
    end: CpuReading

    @property
    def elapsed_ns(self) -> int:
        return self.end.at_ns - self.begin.at_ns

    @property
    def relay_ns(self) -> int:
        return self.end.relay_ns - self.begin.relay_ns

    @property
    def relay_share(self) -> float:
        """Returns the share of the relay's core that the relay used."""
        return self.relay_ns / self.elapsed_ns

    @property
    def others_share(self) -> float:
        """Returns the share of the relay's core that other processes used."""
        return max(0.0, (self.end.core_ns - self.begin.core_ns - self.relay_ns) / self.elapsed_ns)

    @property
    def load_others_share(self) -> float:
        """Returns the use of the cores of load generator and engine by other processes, as a number of busy cores."""
        own_ns = self.end.engine_ns + self.end.load_ns - self.begin.engine_ns - self.begin.load_ns
        return max(0.0, (self.end.load_core_ns - self.begin.load_core_ns - own_ns) / self.elapsed_ns)

    def shares(self, count: int) -> dict[str, float]:
        """Returns the figures of the interval by name: CPU time of relay, engine and load generator in microseconds per
        request or event, requests or events per second, and the used shares of the cores. `count`: number of requests
        or events in the interval."""
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
    """Reads the CPU time of relay, engine and load generator. `relay`: the relay's processes; None: there is no
    relay."""

    relay: ProcessGroup | None
    engine_pid: int
    cores: Cores

    def measure(self, load: Running, *, after_s: float, span_s: float) -> CpuCost:
        """Returns the CPU time that was used in an interval of `span_s` seconds, which begins `after_s` seconds after
        the start of the load. Blocks until the interval has ended."""
        _sleep_until(load.begun_ns + int(after_s * 1e9))
        begin = self._read(load)
        _sleep_until(begin.at_ns + int(span_s * 1e9))
        return CpuCost(begin, self._read(load))

    def _read(self, load: Running) -> CpuReading:
        relay_ns = self.relay.cpu_ns() if self.relay else 0
        engine_ns, load_ns = cpu_ns(self.engine_pid), cpu_ns(load.process.pid)
        core_ns, load_core_ns = busy_ns(self.cores.relay), busy_ns(self.cores.load)
        return CpuReading(time.monotonic_ns(), relay_ns, engine_ns, load_ns, core_ns, load_core_ns)


def wait_for_idle(cores: Cores, *, timeout_s: float) -> None:
    """Waits until these cores are almost idle, for at most `timeout_s` seconds."""
    both = cores.relay | cores.load
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        busy, at = busy_ns(both), time.monotonic_ns()
        time.sleep(POLL_S)
        if busy_ns(both) - busy < IDLE_SHARE * (time.monotonic_ns() - at) * len(both):
            return


def _sleep_until(at_ns: int) -> None:
    while (left_ns := at_ns - time.monotonic_ns()) > 0:
        time.sleep(left_ns / 1e9)
