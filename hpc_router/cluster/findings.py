"""What the router that serves has found amiss: replicas that are ready by their own word, its own processes.

A pure reading of its `/status`; who is not ready by its own word is the files' to explain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hpc_router.cluster.launcher import ROUTER
from hpc_router.cluster.view import ReplicaView, Standing

_KNOWN: Final = (Standing.READY, Standing.REGISTERED)
_LOG: Final = "`hpc-router logs router` tells more"


@dataclass(frozen=True, slots=True)
class Finding:
    view: ReplicaView
    what: str
    advice: str | None


def findings(shown: Sequence[ReplicaView], told: Mapping[str, Any]) -> list[Finding]:
    """`told`: the answer to `/status`; empty where there is none."""
    listed = [r for e in (told.get("experts") or {}).values() for r in e.get("replicas", ())]
    known = {r["replica"]: r for r in listed}
    found = [
        finding
        for view in shown
        if view.standing in _KNOWN and view.expert != ROUTER
        if (finding := _of_replica(view, known.get(view.replica))) is not None
    ]
    return [*_of_router(shown, told.get("router") or {}), *found]


def _of_replica(view: ReplicaView, known: Mapping[str, Any] | None) -> Finding | None:
    """One that has erred is told even while it is in use."""
    if known is None:
        return None
    state, trouble = known.get("state"), known.get("trouble")
    if state == "ready" and not trouble:
        return None
    used = "the router still uses it" if state == "ready" else f"the router does not use it ({state})"
    return Finding(view, f"{used}: {trouble or 'no reason given'}", f"`hpc-router logs {view.replica}` tells more")


def _of_router(shown: Sequence[ReplicaView], router: Mapping[str, Any]) -> list[Finding]:
    view = next((v for v in shown if v.replica == router.get("replica")), None)
    if view is None:
        return []
    workers = router.get("workers") or ()
    found = [
        Finding(view, f"worker {w['worker']} does not serve: {w.get('last_end') or 'it is being started'}", _LOG)
        for w in workers
        if not w["serving"]
    ]
    named = [(f"worker {w['worker']}", w) for w in workers] + [("the control process", router.get("control") or {})]
    for name, process in named:
        if process.get("restarts"):
            times = "once" if process["restarts"] == 1 else f"{process['restarts']} times"
            found.append(Finding(view, f"{name} was started again {times}: the last one {process['last_end']}", _LOG))
    if router.get("settings_trouble"):
        advice = "`hpc-router set KEY=` takes a setting back; an artefact may be trained anew"
        found.append(Finding(view, f"a change is not taken over: {router['settings_trouble']}", advice))
    return found
