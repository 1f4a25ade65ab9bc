"""What is amiss with the processes and settings of the router that serves, by its own word: a reading of `/status`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hpc_router.cluster.commands.replica_view import ReplicaView

_LOG: Final = "`hpc-router logs router` tells more"


@dataclass(frozen=True, slots=True)
class ReplicaFinding:
    view: ReplicaView
    what: str
    advice: str | None


def findings(shown: Sequence[ReplicaView], told: Mapping[str, Any]) -> list[ReplicaFinding]:
    """`told`: the answer to `/status`; empty where there is none."""
    router = told.get("router") or {}
    view = next((v for v in shown if v.replica == router.get("replica")), None)
    if view is None:
        return []
    workers = router.get("workers") or ()
    found = [
        ReplicaFinding(view, f"worker {w['worker']} does not serve: {w.get('last_end') or 'it is being started'}", _LOG)
        for w in workers
        if not w["serving"]
    ]
    named = [(f"worker {w['worker']}", w) for w in workers] + [("the control process", router.get("control") or {})]
    for name, process in named:
        if process.get("restarts"):
            times = "once" if process["restarts"] == 1 else f"{process['restarts']} times"
            found.append(
                ReplicaFinding(view, f"{name} was started again {times}: the last one {process['last_end']}", _LOG)
            )
    for failure in router.get("task_failures") or ():
        what = f"the background task '{failure['task']}' failed and was started again: {failure['last_error']}"
        found.append(ReplicaFinding(view, what, _LOG))
    if router.get("settings_trouble"):
        advice = "`hpc-router set KEY=` restores the configured value; an artefact can be trained again"
        found.append(ReplicaFinding(view, f"a change was not applied: {router['settings_trouble']}", advice))
    return found
