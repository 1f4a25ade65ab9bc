"""Shows progress on a terminal: the load of a point, or the steps of a benchmark."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status

from hpc_router.bench.background import repeated
from hpc_router.bench.config import BenchConfig
from hpc_router.bench.workload import Point

TICK_S: Final = 0.25


@contextmanager
def progress(
    console: Console, config: BenchConfig, point: Point, *, done: int, total: int, label: str = ""
) -> Iterator[None]:
    """Shows two bars during the block: the elapsed seconds of the load of `point`, and the number of finished points
    (`done` of `total`). Shows nothing if the output is not a terminal."""
    load_s = None if config.duration_s is None else config.warmup_s + config.duration_s
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn())
    disabled = not console.file.isatty()
    with Progress(*columns, console=console, transient=True, disable=disabled) as bars:
        name = f"{label} {point.name}".strip()
        bars.add_task("points", total=total, completed=done, status=f"{done} of {total} done")
        task = bars.add_task(name, total=load_s, status="load" if load_s else f"{config.requests} requests")
        begun = time.monotonic()
        with repeated(lambda: bars.update(task, completed=time.monotonic() - begun), every_s=TICK_S):
            yield


class StepDisplay:
    """Displays the current step and the elapsed seconds: one changing line on a terminal, else a new line per step."""

    def __init__(self, console: Console) -> None:
        self._console, self._begun = console, time.monotonic()
        self._status: Status | None = None

    def __enter__(self) -> "StepDisplay":
        if self._console.is_terminal:
            self._status = self._console.status("", refresh_per_second=2)
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, text: str) -> None:
        line = f"{time.monotonic() - self._begun:7.1f} s  {text}"
        if self._status is not None:
            self._status.update(line)
        else:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
