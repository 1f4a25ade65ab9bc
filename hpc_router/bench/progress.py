"""How far a point is, on a terminal: seconds of its load, and how many points are done."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.workload import Point

TICK_S: Final = 0.25


@contextmanager
def progress(
    console: Console, config: BenchConfig, point: Point, *, done: int, total: int, label: str = ""
) -> Iterator[None]:
    """Nothing is drawn where nobody looks."""
    whole_s = None if config.duration_s is None else config.warmup_s + config.duration_s
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    disabled = not console.file.isatty()
    with Progress(*columns, console=console, transient=True, disable=disabled) as drawn:
        told = f"{label} {point.name}".strip()
        drawn.add_task("points", total=total, completed=done, told=f"{done} of {total} done")
        task = drawn.add_task(told, total=whole_s, told="load" if whole_s else f"{config.requests} requests")
        over = threading.Event()
        ticks = threading.Thread(target=_tick, args=(drawn, task, over), daemon=True)
        ticks.start()
        try:
            yield
        finally:
            over.set()
            ticks.join()


def _tick(drawn: Progress, task: TaskID, over: threading.Event) -> None:
    begun = time.monotonic()
    while not over.wait(TICK_S):
        drawn.update(task, completed=time.monotonic() - begun)
