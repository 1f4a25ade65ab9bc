"""Processes of a benchmark: begun on given cores, weighed while they run, ended by their ids whatever happens.

CPU is what the kernel's scheduler counted for every thread (`schedstat`, nanoseconds), memory what nobody else shares
(`smaps_rollup`), both over a process and all its descendants. Processes that were forked share what was there before:
it is counted once, in parts (`Pss_Anon`).
"""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

STOP_S: Final = 5.0
_PRIVATE: Final = ("Private_Clean", "Pss_Anon", "Pss_Shmem")


@dataclass(frozen=True, slots=True)
class Cores:
    """Where what runs. One core for both is possible, and says less."""

    load: frozenset[int]
    relay: frozenset[int]

    @property
    def apart(self) -> bool:
        return not self.load & self.relay


def cores_of(usable: Sequence[int]) -> Cores:
    """The last core is the relay's alone; the load generator and the engine share the others, two at most."""
    ordered = sorted(usable)
    return Cores(frozenset(ordered[:-1][:2] or ordered), frozenset(ordered[-1:]))


@contextmanager
def on(cores: frozenset[int]) -> Iterator[None]:
    """What is started inside stays on these cores, threads that it begins at once included."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(slots=True)
class ProcessGroup:
    """Processes that together are one relay."""

    roots: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, argv: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """In the folder of its log: Python would take modules from where we happen to be."""
        with log.open("ab") as stream:
            self.roots.append(
                subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    cwd=log.parent,
                    env=None if environment is None else {**os.environ, **environment},
                    start_new_session=True,  # Ctrl-C is ours to answer
                )
            )

    def died(self) -> bool:
        return any(root.poll() is not None for root in self.roots)

    def cpu_ns(self) -> int:
        return sum(cpu_ns(process.pid) for process in self._all())

    def private_mb(self) -> float:
        return sum(private_mb(process.pid) for process in self._all())

    def end(self) -> None:
        processes = self._all()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=STOP_S)
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
def group() -> Iterator[ProcessGroup]:
    made = ProcessGroup()
    try:
        yield made
    finally:
        made.end()


def cpu_ns(pid: int) -> int:
    """0 for one that is gone."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            total += int(task.read_text().split()[0])
    return total


def busy_ns(cores: frozenset[int]) -> int:
    """What these cores have worked, for whomever, and what a hypervisor took from them."""
    lines = Path("/proc/stat").read_text().splitlines()
    times = {words[0]: [int(word) for word in words[1:9]] for words in map(str.split, lines) if words[0][:3] == "cpu"}
    ticks = sum(sum(times[f"cpu{core}"]) - sum(times[f"cpu{core}"][3:5]) for core in cores if f"cpu{core}" in times)
    return ticks * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))  # 3 and 4: idle, waiting for a disk


def private_mb(pid: int) -> float:
    """In MiB; 0 for one that is gone."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(_PRIVATE)) / 1024
    return 0.0
