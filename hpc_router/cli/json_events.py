"""The progress of verbs that take long, as one JSON object per line on stdout, for scripts (`--json`).

Each object has `event` and `at` (Unix seconds). Events of `up` are `run` (it has begun), `replica` (its state has
changed) and `serving`; those of `down` are `ending` (the jobs that are left) and `down`; those of `apply` are `change`,
`progress` and `applied`; `batch` with `--wait` has the event `batch` (its state has changed); those of a training are
`stage` and `trained`; those of a benchmark `sweep`, `point`, `point_done`, `measured` and `records`. After an error the
last event is `failed`, after Ctrl-C `interrupted`.
"""

import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hpc_router.errors import HpcRouterError
from hpc_router.state.run_directory import RunDir

if TYPE_CHECKING:  # a training has no aiohttp in its environment
    from hpc_router.cluster.commands.replica_view import ReplicaView
    from hpc_router.cluster.control_loop.slots import Attempt
    from hpc_router.cluster.planning.plan import Plan


class JsonEvents:
    """Prints what `up`, `down`, `apply`, `batch`, a training or a benchmark reports as JSON events, during a `with`
    block. If the block ends with an error, prints it as the last event; the error is raised nevertheless."""

    def __init__(self) -> None:
        self._shown: dict[tuple[str, str], dict[str, Any]] = {}
        self._left: list[str] | None = None

    def __enter__(self) -> "JsonEvents":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, HpcRouterError | OSError):
            self.event("failed", error=str(error))
        elif isinstance(error, KeyboardInterrupt):
            self.event("interrupted", error=str(error))

    def event(self, name: str, **facts: Any) -> None:
        print(json.dumps({"event": name, "at": round(time.time(), 3), **facts}, ensure_ascii=False), flush=True)

    def text(self, text: str) -> None:
        self.event("progress", text=text)

    def begin(self, run: RunDir, plan: "Plan") -> None:
        self.event("run", run=str(run.path), warnings=list(plan.warnings))

    def show(self, shown: Sequence["ReplicaView"]) -> None:
        for view in shown:
            facts = {
                "replica": view.replica,
                "expert": view.expert,
                "state": view.state.value,
                "reason": view.reason.value if view.reason is not None else view.pending_reason,
                "message": view.message,
            }
            key = view.expert, view.replica
            if self._shown.get(key) != facts:
                self._shown[key] = facts
                self.event("replica", **facts)

    def living(self, attempts: list["Attempt"]) -> None:
        """Prints an event with the jobs that are left, if these have changed. `down` calls this after each pass."""
        left = [attempt.replica for attempt in attempts]
        if left != self._left:
            self._left = left
            self.event("ending", left=left)
