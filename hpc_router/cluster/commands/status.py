"""`status` as one JSON value: what the control loop sees, merged with what the router says when it answers.

The files tell how jobs stand even when no router runs; the router alone knows what is in flight and what it ejected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView, expert_views, views
from hpc_router.cluster.commands.router_access import RouterAccess, router_access
from hpc_router.cluster.control_loop.loop import ControlLoop, LoopPass
from hpc_router.cluster.control_loop.slots import ROUTER_SLOT, Attempt
from hpc_router.config.adapters import host_of
from hpc_router.errors import LaunchError
from hpc_router.net.http_client import Unreachable, ask
from hpc_router.state.registry import RecordKind
from hpc_router.state.run_directory import RunDir

_ROUTER_KEYS = ("in_flight", "capacity", "models", "silent", "trouble", "error_share", "first_byte_s", "sick")


def status(run: RunDir) -> dict[str, Any]:
    """`{run, down, full, router, policy, experts}`; unknown values are None."""
    control = ControlLoop(run, read_only=True)
    seen = control.preview(fresh=True)
    down = seen.desired.down
    shown = replica_views(control, seen)
    access, told, trouble = ask_router(run)
    known = {r["replica"]: r for e in (told.get("experts") or {}).values() for r in e.get("replicas", ())}
    routers = [view for view in shown if view.kind is RecordKind.ROUTER]
    router: dict[str, Any] = {"url": None, "state": "down" if down else "missing", "replica": None}
    if routers:
        router |= routers[-1].to_json()
    router |= told.get("router") or {}
    router["standby"] = _standby(seen.observed.get(ROUTER_SLOT, ()), router["replica"])
    router |= {"url": access.url if access else router["url"], "answers": bool(told), "trouble": trouble}
    configured = control.deployment.experts
    experts: dict[str, Any] = {
        name: {
            "replicas": [],
            "wanted": seen.desired.replicas.get(host_of(configured, name), 0),
            "adapter_of": expert.adapter_of,
        }
        for name, expert in configured.items()
    }
    for view in expert_views(shown):
        entry = experts.setdefault(view.expert, {"replicas": [], "wanted": 0, "adapter_of": None})
        entry["replicas"].append(_merged(view, known.get(view.replica)))
    for entry in experts.values():
        host = entry["adapter_of"]
        if host is not None:  # beside endpoints of its own that run elsewhere
            entry["replicas"] += experts[host]["replicas"]
    for name, entry in experts.items():
        said = (told.get("experts") or {}).get(name) or {}
        entry["ready"] = sum(r["state"] == DisplayedState.READY for r in entry["replicas"])
        entry["waiting"] = said.get("waiting")
    policy = control.deployment.policy
    return {
        "run": str(run.path),
        "down": down,
        "full": run.full(),
        "router": router,
        "policy": told.get("policy") or {"kind": policy.kind, "fallback": policy.fallback, "artefact": None},
        "experts": experts,
    }


def _standby(attempts: Sequence[Attempt], serving: str | None) -> str | None:
    """The successor that waits for the router's end."""
    waiting = [attempt.replica for attempt in attempts if attempt.live and not attempt.ready]
    return next((replica for replica in waiting if serving is not None and replica != serving), None)


def replica_views(control: ControlLoop, seen: LoopPass) -> list[ReplicaView]:
    """Also of a run that is down, whose failures are still worth telling."""
    if not seen.desired.down:
        return views(seen, control.observer.records)
    told = control.decide(replace(seen.desired, down=False), seen.observed)
    shown = views(told, control.observer.records)
    gone = (DisplayedState.MISSING, DisplayedState.WAITING)
    return [replace(v, state=DisplayedState.STOPPED) if v.state in gone else v for v in shown]


def ask_router(run: RunDir) -> tuple[RouterAccess | None, Mapping[str, Any], str | None]:
    """Access, its answer, and why there is none."""
    try:
        access = router_access(run)
    except LaunchError as error:
        return None, {}, str(error)
    try:
        answer = ask("GET", f"{access.url}/status", token=access.token)
    except Unreachable as error:
        return access, {}, f"the router does not answer at {access.url}: {error}"
    if answer.status != 200 or not isinstance(answer.body, dict):
        return access, {}, f"the router answers with {answer.message}"
    return access, answer.body, None


def _merged(view: ReplicaView, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """The router's judgement of a registered replica counts: it probes."""
    told = view.to_json() | {"phase": view.state.value} | dict.fromkeys(_ROUTER_KEYS)
    if known is None:
        return told
    told |= {key: known.get(key) for key in _ROUTER_KEYS}
    if view.state in (DisplayedState.READY, DisplayedState.REGISTERED):
        told["state"] = known.get("state", told["state"])
    return told
