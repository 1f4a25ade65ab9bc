"""Shows the progress of a benchmark: the load of a point, or the steps."""

import time
from collections.abc import Callable, Iterator
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
    console: Console,
    config: BenchConfig,
    point: Point,
    *,
    done: int,
    total: int,
    label: str = "",
    event: Callable[..., None] | None = None,
) -> Iterator[None]:
    """Shows the load of `point` during the block, and the number of finished points (`done` of `total`): on a terminal
    two bars, else a line on stderr at the begin and one at the end. `event`: called with a name and facts instead."""
    load_s = None if config.duration_s is None else config.warmup_s + config.duration_s
    name = f"{label} {point.name}".strip()
    begun = time.monotonic()
    if event is None and console.file.isatty():
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(),
            TextColumn("{task.fields[status]}", markup=False), TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bars:
            bars.add_task("points", total=total, completed=done, status=f"{done} of {total} done")
            task = bars.add_task(name, total=load_s, status="load" if load_s else f"{config.requests} requests")
            with repeated(lambda: bars.update(task, completed=time.monotonic() - begun), every_s=TICK_S):
                yield
        return
    facts = {"point": point.name, "deployment": label, "number": done + 1, "total": total}
    lines = Console(stderr=True, markup=False)

    def show(name_: str, text: str, **more: float) -> None:
        if event is not None:
            event(name_, **facts, **more)
        else:
            line = f"{name}: point {done + 1} of {total}, {text}"
            lines.print(line, highlight=False, markup=False, soft_wrap=True)

    show("point", f"load for {load_s:g} s" if load_s else f"{config.requests} requests")
    yield
    took_s = time.monotonic() - begun
    show("point_done", f"done in {took_s:.1f} s", took_s=round(took_s, 3))


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
