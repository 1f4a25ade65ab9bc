"""Results on a terminal: tables, and the progress of `up` and `down`. This module formats only."""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.status import Status
from rich.table import Table
from rich.text import Text

from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView
from hpc_router.cluster.commands.status import process_problems
from hpc_router.cluster.commands.user_tokens import table_row
from hpc_router.cluster.commands.why import Cause
from hpc_router.cluster.control_loop.slots import Attempt
from hpc_router.state.run_directory import RunDir
from hpc_router.state.user_tokens import UserToken

if TYPE_CHECKING:
    from hpc_router.cluster.planning.plan import Plan

_STYLE: Final[Mapping[str, str]] = {
    "ready": "green",
    "failed": "bold red",
    "ejected": "red",
    "waiting": "yellow",
    "restarting": "yellow",
    "draining": "yellow",
    "stopped": "dim",
    "missing": "dim",
}


def new_table(*columns: str) -> Table:
    """Returns an empty table without lines between its cells."""
    empty = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        empty.add_column(column, overflow="fold")
    return empty


def batch_table(batches: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of `batch status`. `batches`: batch objects of OpenAI's API."""
    table = new_table("batch", "status", "done", "failed", "of", "created", "expires")
    for one in batches:
        counts = one["request_counts"]
        table.add_row(
            one["id"],
            one["status"],
            str(counts["completed"] + counts["failed"]),
            str(counts["failed"]),
            str(counts["total"]),
            *(time.strftime("%Y-%m-%d %H:%M", time.localtime(one[key])) for key in ("created_at", "expires_at")),
        )
    return table


def token_table(tokens: Sequence[UserToken], *, now: float) -> RenderableType:
    table = new_table("id", "user", "expires", "limits", "experts")
    for token in tokens:
        table.add_row(*table_row(token, now=now))
    return table


def usage_table(usage: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a table of each expert's GPU hours, tokens per GPU hour and last request since the run's first launch."""
    table = new_table("expert", "GPU hours used", "idle", "starting", "draining", "tokens per GPU hour", "last request")
    for name, used in usage.items():
        hours, idle_s, tokens = used["gpu_hours"], used["idle_s"], used["tokens_per_gpu_hour"]
        table.add_row(
            name,
            *(f"{hours[state]:.2f}" for state in ("busy", "idle", "starting", "draining")),
            "-" if tokens is None else f"{tokens:.0f}",
            "-" if idle_s is None else f"{idle_s:.0f} s ago" if idle_s < 600 else f"{idle_s / 3600:.1f} h ago",
        )
    return table


def state_text(name: str) -> Text:
    """Returns the name of a state, such as `ready`, in the state's colour."""
    return Text(name, style=_STYLE.get(name, ""))


def plan_text(plan: "Plan") -> RenderableType:
    from hpc_router.cluster.planning.plan import script_without_secrets, without_secrets

    table = new_table("replica", "engine", "nodes", "GPUs", "CPUs", "memory")
    for replica in plan.replicas:
        resources = replica.request.resources
        kind = plan.deployment.experts[replica.expert].engine.kind if replica.engine else "router"
        memory = f"{resources.memory_gb:g} GB" if resources.memory_gb is not None else "-"
        table.add_row(
            replica.request.replica, kind, str(resources.nodes), str(resources.gpus), str(resources.cpus), memory
        )
    policy = plan.deployment.policy
    summary = Text(
        f"policy {policy.kind}, fallback {policy.fallback or 'none'}, cluster {plan.deployment.cluster.kind}"
    )
    training = [] if plan.classifier is None else [Text(plan.classifier)]
    parts: list[RenderableType] = [summary, *training, Text(), table]
    for replica in plan.replicas:
        parts += [
            Text(),
            Text(replica.request.replica, style="bold"),
            Text("  job     " + shlex.join(replica.request.argv)),
        ]
        if len(replica.serves) > 1:
            parts.append(Text("  serves  " + ", ".join(replica.serves)))
        if replica.engine is not None:
            parts.append(Text("  engine  " + shlex.join(replica.engine.argv)))
            parts += [
                Text(f"  with    {key}={value}") for key, value in without_secrets(replica.engine.environment).items()
            ]
    for alike in plan.alike():
        parts += [
            Text(),
            Text(f"{'step' if alike[0].jobid else 'sbatch'} of {', '.join(alike[0].replicas)}", style="bold"),
        ]
        parts += [Text(f"  {line}") for line in script_without_secrets(alike[0]).splitlines()]
        others = [replica for job in alike[1:] for replica in job.replicas]
        parts += [Text(f"and the same for {', '.join(others)}")] if others else []
    if plan.handovers:
        parts += [Text(), Text("at the end of the walltime", style="bold")]
        parts += [Text(f"  {handover.text()}") for handover in plan.handovers]
    parts += [Text(f"note: {warning}", style="yellow") for warning in ("", *plan.warnings) if warning]
    return Group(*parts)


def status_text(value: Mapping[str, Any]) -> RenderableType:
    router = value["router"]
    next_one = f"  standby {router['standby']}" if router["standby"] else ""
    where = f"  {router['url'] or '-'}  on {_text(router.get('node'))}{next_one}  run {value['run']}"
    head = Text.assemble(("router  ", "bold"), state_text(router["state"]), where)
    table = new_table("expert", "replica", "state", "in flight", "restarts", "engine", "node", "job", "left", "")
    for name, expert in value["experts"].items():
        if not expert["replicas"]:
            elastic = expert.get("elastic")
            remark = "no replicas wanted" if elastic is None else f"starts on demand: {elastic['reason']}"
            table.add_row(name, "-", state_text("stopped"), *[""] * 6, (elastic or {}).get("blocked") or remark)
        for replica in expert["replicas"]:
            table.add_row(
                name,
                replica["replica"],
                state_text(replica["state"]),
                _text(replica["in_flight"]),
                str(replica["restarts"]),
                _text(replica["engine"]),
                _text(replica["node"]),
                " ".join(filter(None, (_text(replica["job_id"]), replica["job_state"]))),
                _left(replica["ends_at"]),
                _remark(replica),
            )
    parts: list[RenderableType] = [head, *map(Text, _process_lines(router)), Text(), table]
    usage = {name: used for name, expert in value["experts"].items() if (used := expert.get("usage"))}
    if any(any(used["gpu_hours"].values()) for used in usage.values()):
        parts += [Text(), usage_table(usage)]
    if trouble := value.get("full") or router.get("write_trouble"):
        parts.append(Text(trouble, style="red"))
    if value.get("slurm"):
        parts.append(Text(f"Slurm's controller does not answer: {value['slurm']}", style="yellow"))
    if value["down"]:
        parts.append(Text("this deployment is down; `hpc-router up` starts it again"))
    elif router["trouble"]:
        parts.append(Text(router["trouble"], style="yellow"))
    return Group(*parts)


def _process_lines(router: Mapping[str, Any]) -> list[str]:
    """Returns lines with the load of the router's workers, and with the problems of the router's processes and
    settings. `router`: the section `router` of `status`."""
    workers = router.get("workers") or ()
    loads = ", ".join(_text(w["in_flight"]) if w["serving"] else "being started" for w in workers)
    lines = [f"workers {len(workers)}  in flight {loads}"] if workers else []
    lines += process_problems(router)
    if router.get("share_trouble"):
        lines.append(f"the router is not shared: {router['share_trouble']}")
    if router.get("settings_trouble"):
        lines.append(f"a change was not applied: {router['settings_trouble']}")
    return lines


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _left(ends_at: float | None) -> str:
    """Returns the time until `ends_at` (Unix seconds), the end of a walltime, as text."""
    if ends_at is None:
        return "-"
    return _minutes(max(0, int(ends_at - time.time())) // 60)


def duration(seconds: float | None) -> str:
    """Returns a duration as text with about two digits; empty for None."""
    if seconds is None:
        return ""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"
    return _minutes(int(seconds) // 60)


def _minutes(minutes: int) -> str:
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h" if hours < 48 else f"{hours // 24} days"


def _remark(replica: Mapping[str, Any]) -> str:
    """Returns the problem of a replica as text. If it has none: why its job waits, or which replica is to replace it.
    The address of an external endpoint comes before this."""
    waits = f"waits: {replica['pending']}" if replica["pending"] else None
    successor = f"{replica['successor']} is to replace it" if replica["successor"] else None
    problem = replica["message"] or replica["trouble"] or waits or successor
    where = replica["url"] if replica["kind"] == "external" else None
    return ": ".join(str(part) for part in (where, replica["reason"], problem) if part)


def why_text(causes: Sequence[Cause]) -> RenderableType:
    if not causes:
        return Text("no problem found: every wanted replica is ready", style="green")
    parts: list[RenderableType] = []
    for cause in causes:
        view = cause.view
        parts.append(Text.assemble((view.replica, "bold"), "  ", state_text(view.state.value), f"  {cause.what}"))
        if view.reason is not None:
            parts.append(Text(f"  {view.reason.value}: {view.message or ''}"))
        parts += [Text(f"    | {line}", style="dim") for line in cause.lines]
        if cause.advice:
            parts.append(Text(f"  do: {cause.advice}"))
    return Group(*parts)


def route_text(value: Mapping[str, Any]) -> RenderableType:
    decision = new_table("expert", "reason", "cluster", "score", "margin", "runner-up")
    decision.add_row(*(_text(value.get(k)) for k in ("expert", "reason", "cluster", "score", "margin", "runner_up")))
    terms = value.get("terms") or []
    if not terms:
        return decision
    part = value.get("decided_by") or "all"
    decided_by = [] if part == "all" else [Text(f"decided by: {part}")]
    if value.get("topic"):
        decided_by.append(Text(f"nearer than any expert: {value['topic']}"))
    weights = new_table("term", "weight")
    for term in terms:
        weights.add_row(str(term["term"]), str(term["weight"]))
    return Group(decision, *decided_by, Text(), weights)


class UpProgress:
    """Shows the progress of `up` and `down`: a live table on a terminal, else a line for every change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._printed: dict[str, str] = {}
        self._since = time.monotonic()

    def __enter__(self) -> "UpProgress":
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exception)

    def begin(self, run: RunDir, plan: "Plan") -> None:
        self._console.print(f"run {run.path}", highlight=False, soft_wrap=True)
        if plan.classifier is not None and not run.classifier.is_dir():
            self._console.print(plan.classifier, highlight=False, soft_wrap=True)
        for warning in plan.warnings:
            self._console.print(Text(f"note: {warning}", style="yellow"))

    def show(self, shown: Sequence[ReplicaView]) -> None:
        if self._live is not None:
            table = new_table("replica", "state", "")
            for view in shown:
                table.add_row(view.replica, state_text(view.state.value), _failure(view) or view.message or "")
            self._live.update(table)
            return
        for view in shown:
            line = f"{view.replica} {view.state.value} {_failure(view)}".rstrip()
            if view.state is not DisplayedState.MISSING and self._printed.get(view.expert + view.replica) != line:
                self._printed[view.expert + view.replica] = line
                elapsed_s = time.monotonic() - self._since
                self._console.print(f"{elapsed_s:6.1f} s  {line}", highlight=False, markup=False, soft_wrap=True)

    def living(self, attempts: list[Attempt]) -> None:
        """Shows the jobs that are left. `down` calls this after each pass."""
        line = ", ".join(attempt.replica for attempt in attempts)
        if self._live is not None:
            self._live.update(Text(f"ending {line}" if line else ""))
        elif line and self._printed.get("") != line:
            self._printed[""] = line
            self._console.print(f"ending {line}", highlight=False, markup=False, soft_wrap=True)


class TextProgress:
    """Prints each text as a line. On a terminal, the last text also stays at the bottom with a moving sign, which shows
    that the verb still works."""

    def __init__(self) -> None:
        self._console = Console(markup=False)
        self._status: Status | None = None

    def __enter__(self) -> "TextProgress":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._status is not None:
            self._status.stop()

    def text(self, text: str) -> None:
        if not self._console.is_terminal:
            print(text, flush=True)
            return
        if self._status is None:
            self._status = self._console.status("")
            self._status.start()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._status.update(Text(text))


def _failure(view: ReplicaView) -> str:
    """Returns why a replica failed; if it did not, why its job waits; otherwise an empty text."""
    if view.reason is not None:
        return f"{view.reason.value}: {view.message or ''}"
    return f"waits: {view.pending_reason}" if view.pending_reason is not None else ""


def trace_text(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Returns the records of one request id as text: a table per request, and a line per score."""
    parts: list[RenderableType] = []
    for record in records:
        if record.get("kind") == "feedback":
            by = f" by {record['user']}" if record.get("user") else ""
            parts.append(Text(f"score {record.get('score')}{by} at {_local_time(record.get('at'))}"))
            continue
        table = new_table("", "")
        table.show_header = False
        for name, value in _trace_rows(record):
            table.add_row(Text(name, style="bold"), value)
        parts.append(table)
    return Group(*parts)


def _trace_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the rows of a request's table, each as (name, text), for what its record contains."""
    yield "request", f"{record.get('id')}  {_local_time(record.get('at'))}  {record.get('path')}"
    yield "user", f"{record.get('user') or 'the owner'}"
    status, error = record.get("status"), record.get("error")
    yield (
        "end",
        f"{record.get('outcome')}{'' if status is None else f', status {status}'}{f', {error}' if error else ''}",
    )
    if record.get("model"):
        yield "model", f"{record['model']}{' (stream)' if record.get('stream') else ''}"
    if record.get("expert"):
        score, margin = record.get("score"), record.get("margin")
        numbers = [f"{name} {value:.3f}" for name, value in (("score", score), ("margin", margin)) if value is not None]
        cluster = [f"cluster {record['cluster']}"] if record.get("cluster") else []
        other = [f"runner-up {record['runner_up']}"] if record.get("runner_up") else []
        yield "expert", ", ".join([f"{record['expert']} ({record.get('reason')})", *cluster, *numbers, *other])
    if record.get("classifier"):
        yield "classifier", str(record["classifier"])
    if record.get("replica"):
        where = [f"{name} {record[name]}" for name in ("job", "node") if record.get(name)]
        yield "replica", ", ".join([str(record["replica"]), *where])
    if record.get("served_model"):
        revision = record.get("revision")
        yield "served as", f"{record['served_model']}{f', revision {revision}' if revision else ''}"
    for failed in record.get("failed") or ():
        yield "failed at", f"{failed.get('replica')}: {failed.get('cause')}"
    tokens = [(record.get(f"{name}_tokens"), name) for name in ("prompt", "cached", "generated")]
    known = [f"{count} {name}" for count, name in tokens if count is not None]
    if known:
        source = record.get("token_source")
        yield "tokens", ", ".join(known) + (f" (from {source})" if source else "")
    times = [(record.get(f"{key}_s"), text) for key, text in _TIMES]
    shown = [f"{text} {value:.3f} s" for value, text in times if value is not None]
    if shown:
        yield "times", ", ".join(shown)


_TIMES: Final = (("queue", "queue"), ("first_byte", "first byte"), ("total", "total"))


def _local_time(at: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if isinstance(at, int | float) else "-"


def usage_text(value: Mapping[str, Any]) -> RenderableType:
    """Returns `value`, the result of the verb `usage`, as tables."""
    by = value["by"]
    table = new_table(*by, "requests", "failed", "prompt tokens", "of them cached", "generated tokens", "waited")
    for group in value["groups"]:
        counts = (f"{group[name]:,}" for name in ("requests", "failed", "prompt_tokens"))
        more = (f"{group[name]:,}" for name in ("cached_tokens", "generated_tokens"))
        table.add_row(*(group[name] or "-" for name in by), *counts, *more, f"{group['queue_s']:,.1f} s")
    parts: list[RenderableType] = [Text(f"since {_local_time(value['since'])}"), table]
    if value["gpu_hours"]:
        hours = new_table("expert", "GPU hours")
        for expert, count in value["gpu_hours"].items():
            hours.add_row(expert, f"{count:,.2f}")
        parts += ["", hours]
    return Group(*parts)
