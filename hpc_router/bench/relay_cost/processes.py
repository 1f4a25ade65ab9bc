"""Starts the processes of a benchmark on given cores, reads their CPU time and memory from /proc, and ends them.

CPU time is the time that the kernel's scheduler counted per thread (`schedstat`, in nanoseconds). Memory is private
memory (`smaps_rollup`); pages that forked processes share are counted once in total (`Pss_Anon`). Both are sums over a
process and all its descendants.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

STOP_TIMEOUT_S: Final = 5.0
_PRIVATE: Final = ("Private_Clean", "Pss_Anon", "Pss_Shmem")


@dataclass(frozen=True, slots=True)
class Cores:
    """The cores of a benchmark: `load`, on which load generator and engine run, and `relay`, on which the relay runs.
    Both are the same if the machine has only one core."""

    load: frozenset[int]
    relay: frozenset[int]

    @property
    def separate(self) -> bool:
        return not self.load & self.relay


def cores_of(usable: Sequence[int]) -> Cores:
    """Assigns the `usable` cores: the last one to the relay, and up to two others to load generator and engine."""
    ordered = sorted(usable)
    return Cores(frozenset(ordered[:-1][:2] or ordered), frozenset(ordered[-1:]))


@contextmanager
def pinned_to(cores: frozenset[int]) -> Iterator[None]:
    """Pins the processes that are started in the block to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(slots=True)
class ProcessGroup:
    """The processes that are started for one relay."""

    roots: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, argv: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Starts a process whose output goes to the file `log`. Its working folder is that of `log`, so that Python
        imports no modules from the caller's working folder."""
        with log.open("ab") as stream:
            self.roots.append(
                subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    cwd=log.parent,
                    env=None if environment is None else {**os.environ, **environment},
                    start_new_session=True,  # Ctrl-C reaches only the benchmark, which then ends this process
                )
            )

    def died(self) -> bool:
        return any(root.poll() is not None for root in self.roots)

    def cpu_ns(self) -> int:
        return sum(cpu_ns(process.pid) for process in self._all())

    def private_mb(self) -> float:
        return sum(private_mb(process.pid) for process in self._all())

    def end(self) -> None:
        """Sends SIGTERM to all processes, and SIGKILL to those that have not ended after a timeout."""
        processes = self._all()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for root in self.roots:
            root.wait()

    def _all(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for root in self.roots:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(root.pid)
                found += [process, *process.children(recursive=True)]
        return found


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Yields a process group, and ends its processes with the block."""
    group = ProcessGroup()
    try:
        yield group
    finally:
        group.end()


def cpu_ns(pid: int) -> int:
    """Returns the CPU time of all threads of a process in nanoseconds; 0 if the process has ended."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            total += int(task.read_text().split()[0])
    return total


def busy_ns(cores: frozenset[int]) -> int:
    """Returns the total busy time of these cores in nanoseconds, including time stolen by a hypervisor."""
    lines = Path("/proc/stat").read_text().splitlines()
    times = {row[0]: [int(ticks) for ticks in row[1:9]] for row in map(str.split, lines) if row[0][:3] == "cpu"}
    ticks = sum(sum(times[f"cpu{core}"]) - sum(times[f"cpu{core}"][3:5]) for core in cores if f"cpu{core}" in times)
    return ticks * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))  # 3 and 4: idle and iowait


def private_mb(pid: int) -> float:
    """Returns the private memory of a process in MiB; 0 if it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(_PRIVATE)) / 1024
    return 0.0
