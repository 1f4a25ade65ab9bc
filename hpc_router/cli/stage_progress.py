"""The progress of work in stages, such as a training: bars on a terminal, else a line for each tenth of a stage."""

import time
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hpc_router.cli.json_events import JsonEvents

PARTS: Final = 10
"""Number of lines or events of a stage after its first one."""


class StageProgress:
    """Shows how much of each stage is done, during a `with` block: as JSON events on stdout if `events` is given, else
    on the console. A call is one report: the stage, and how many of its `total` units are done."""

    def __init__(self, console: Console, *, events: JsonEvents | None = None) -> None:
        self._console, self._events = console, events
        self._since = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._parts: dict[str, int] = {}  # by stage, how many parts of it are reported

    def __enter__(self) -> "StageProgress":
        if self._events is None and self._console.is_terminal:
            columns = (
                TextColumn("{task.description:>10}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bars = Progress(*columns, console=self._console)
            self._bars.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
            return
        part = PARTS * done // max(total, 1)
        if self._parts.get(stage, -1) >= part:
            return
        self._parts[stage] = part
        if self._events is not None:
            self._events.event("stage", stage=stage, done=done, total=total)
            return
        elapsed_s = time.monotonic() - self._since
        line = f"{elapsed_s:6.1f} s  {stage}: {done} of {total}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
