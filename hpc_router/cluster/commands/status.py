"""Builds the result of `status`: the observed jobs, merged with the router's own `/status` if it answers.

Files show the state of jobs even when no router runs. Only the router knows requests in flight and ejected replicas.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView, expert_views, views
from hpc_router.cluster.commands.router_access import RouterAccess, router_access
from hpc_router.cluster.control_loop.loop import ControlLoop, LoopPass
from hpc_router.cluster.control_loop.slots import ROUTER_SLOT, Attempt
from hpc_router.config.adapters import host_of
from hpc_router.config.elastic import replica_limits
from hpc_router.config.schema import ExpertConfig
from hpc_router.errors import LaunchError, RegistryError
from hpc_router.net.http_client import Unreachable, call_blocking
from hpc_router.state.atomic_files import read_json
from hpc_router.state.gpu_hours import ExpertUsage, parse_usage
from hpc_router.state.registry import RecordKind
from hpc_router.state.run_directory import RunDir

_ROUTER_KEYS = (
    "in_flight",
    "capacity",
    "models",
    "silent",
    "trouble",
    "error_share",
    "first_byte_s",
    "sick",
    "engine_load",
)


def status(run: RunDir) -> dict[str, Any]:
    """Returns `{run, down, full, slurm, router, policy, experts}` of a run; unknown values are None. `down`: whether
    the run was taken down. `full`: why the run directory cannot be written; None if it can. `slurm`: why the Slurm
    controller did not answer; None if it did."""
    control = ControlLoop(run, read_only=True)
    seen = control.preview(fresh=True)
    down = seen.desired.down
    shown = replica_views(control, seen)
    access, answer, trouble = ask_router(run)
    known = _known_replicas(answer)
    routers = [view for view in shown if view.kind is RecordKind.ROUTER]
    router: dict[str, Any] = {"url": None, "state": "down" if down else "missing", "replica": None}
    if routers:
        router |= routers[-1].to_json()
    router |= answer.get("router") or {}
    router["standby"] = _standby(seen.observed.get(ROUTER_SLOT, ()), router["replica"])
    router |= {"url": access.url if access else router["url"], "answers": bool(answer), "trouble": trouble}
    configured = control.deployment.experts
    experts: dict[str, Any] = {
        name: {
            "replicas": [],
            "wanted": seen.desired.replicas.get(host_of(configured, name), 0),
            "adapter_of": expert.adapter_of,
            "elastic": _elastic(seen, host_of(configured, name), configured),
        }
        for name, expert in configured.items()
    }
    for view in expert_views(shown):
        entry = experts.setdefault(view.expert, {"replicas": [], "wanted": 0, "adapter_of": None, "elastic": None})
        entry["replicas"].append(_merged(view, known.get(view.replica), answered=bool(answer)))
    for entry in experts.values():
        host = entry["adapter_of"]
        if host is not None:  # an adapter's name may also have external endpoints
            entry["replicas"] += experts[host]["replicas"]
    used, now = _read_usage(run), time.time()
    for name, entry in experts.items():
        own = (answer.get("experts") or {}).get(name) or {}
        entry["ready"] = sum(r["state"] == DisplayedState.READY for r in entry["replicas"])
        entry["waiting"] = own.get("waiting")
        entry["usage"] = None if name not in used else used[name].to_json(now)  # an adapter has none
    policy = control.deployment.policy
    return {
        "run": str(run.path),
        "down": down,
        "full": run.space_error(),
        "slurm": control.launcher.trouble(),
        "router": router,
        "policy": answer.get("policy") or {"kind": policy.kind, "fallback": policy.fallback, "artefact": None},
        "experts": experts,
    }


def _elastic(seen: LoopPass, host: str, experts: Mapping[str, ExpertConfig]) -> dict[str, Any] | None:
    """Returns the number of replicas of the expert `host`, its limits and the reason; None if it is not elastic."""
    state = seen.desired.elastic.get(host)
    if state is None:
        return None
    low, high = replica_limits(experts[host])
    limits = {"min_replicas": low, "max_replicas": high, "replicas": state.replicas}
    return limits | {"since": state.changed_at or None, "reason": state.reason, "blocked": state.blocked}


def _read_usage(run: RunDir) -> Mapping[str, ExpertUsage]:
    """Returns the usage by expert; empty if it has not been counted yet, or if the file is damaged."""
    content = read_json(run.gpu_hours_json)
    try:
        return {} if content is None else parse_usage(content).experts
    except RegistryError:
        return {}


def _standby(attempts: Sequence[Attempt], serving: str | None) -> str | None:
    """Returns the router that waits for the end of the serving one; None if there is none."""
    waiting = [attempt.replica for attempt in attempts if attempt.live and not attempt.ready]
    return next((replica for replica in waiting if serving is not None and replica != serving), None)


def replica_views(control: ControlLoop, seen: LoopPass) -> list[ReplicaView]:
    """Returns the views of all replicas. If the run is down, returns those of the replicas that ran before, as stopped
    or with their last failures."""
    if not seen.desired.down:
        return views(seen, control.observer.records)
    as_up = control.decide(replace(seen.desired, down=False), seen.observed)
    shown = views(as_up, control.observer.records)
    not_running = (DisplayedState.MISSING, DisplayedState.WAITING)
    return [replace(v, state=DisplayedState.STOPPED) if v.state in not_running else v for v in shown]


def ask_router(run: RunDir, path: str = "/status") -> tuple[RouterAccess | None, Mapping[str, Any], str | None]:
    """Asks the router for the JSON object at `path`. Returns three values: access to the router, None if no router
    serves or proves its identity; the object, empty without an answer; the error as text, None after success."""
    try:
        access = router_access(run)
    except LaunchError as error:
        return None, {}, str(error)
    try:
        answer = call_blocking("GET", f"{access.url}{path}", token=access.token, certificate=access.certificate)
    except Unreachable as error:
        return access, {}, f"the router does not answer at {access.url}: {error}"
    if answer.status != 200 or not isinstance(answer.body, dict):
        return access, {}, f"the router answers with {answer.message}"
    return access, answer.body, None


def _merged(view: ReplicaView, known: Mapping[str, Any] | None, *, answered: bool) -> dict[str, Any]:
    """Returns the view as JSON, with values that only the router knows. `known`: the router's data on the replica; None
    if it has none. `answered`: whether the router answers. If the view shows the replica as ready or registered, the
    router's state replaces the view's, because only the router probes replicas: a replica is not ready for clients
    before the router has found it."""
    merged = view.to_json() | {"phase": view.state.value} | dict.fromkeys(_ROUTER_KEYS)
    if known is None:
        if answered and view.state is DisplayedState.READY:
            merged["state"] = DisplayedState.STARTING.value
        return merged
    merged |= {key: known.get(key) for key in _ROUTER_KEYS}
    if view.state in (DisplayedState.READY, DisplayedState.REGISTERED):
        merged["state"] = known.get("state", merged["state"])
    return merged


def found_by_router(run: RunDir, replicas: Iterable[str]) -> bool:
    """Returns whether the router of a run has found these replicas, and none of them is `starting`, its state of
    one that it has not probed yet; False if it does not answer."""
    _, answer, _ = ask_router(run)
    known = _known_replicas(answer)
    return bool(answer) and all(name in known and known[name]["state"] != DisplayedState.STARTING for name in replicas)


def _known_replicas(answer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the router's data on each replica that it knows. `answer`: that of `ask_router`."""
    return {r["replica"]: r for e in (answer.get("experts") or {}).values() for r in e.get("replicas", ())}


def process_problems(router: Mapping[str, Any]) -> list[str]:
    """Returns lines about restarts of the router's processes and background tasks. `router`: the section `router` of
    its `/status`."""
    workers = [(f"worker {w['worker']}", w) for w in router.get("workers") or ()]
    problems = [
        f"{name} was started again {_times(process['restarts'])}: the last one {process['last_end']}"
        for name, process in [*workers, ("the control process", router.get("control") or {})]
        if process.get("restarts")
    ]
    for failure in router.get("task_failures") or ():
        error = f": {failure['last_error']}" if failure["last_error"] else ""
        times = _times(failure["count"])
        problems.append(f"the background task '{failure['task']}' failed {times} and was started again{error}")
    return problems


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
