"""How far a point is, on a terminal: measured requests where their number is known, else seconds of the window."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.measure import Observation, Part


@dataclass(slots=True)
class _Bar:
    drawn: Progress
    task: TaskID
    by_time: bool
    begun: float = field(default_factory=time.monotonic)
    measured: int = 0
    failed: int = 0

    def ended(self, observation: Observation) -> None:
        if observation.part is Part.MEASURED:
            self.measured += 1
            self.failed += observation.error is not None
        done = time.monotonic() - self.begun if self.by_time else self.measured
        self.drawn.update(self.task, completed=done, measured=self.measured, failed=self.failed)


@contextmanager
def progress(console: Console, config: BenchConfig, *, users: int) -> Iterator[_Bar]:
    """Nothing is drawn where nobody looks."""
    total = config.requests if config.duration_s is None else config.warmup_s + config.duration_s
    told = TextColumn("{task.fields[measured]} measured, {task.fields[failed]} failed")
    columns = (TextColumn("{task.description}"), BarColumn(), told, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.file.isatty()) as drawn:
        task = drawn.add_task(f"{users} users", total=total, measured=0, failed=0)
        yield _Bar(drawn, task, by_time=config.duration_s is not None)
