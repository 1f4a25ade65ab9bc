"""Runs the load of one point with the native load generator and returns it as observations.

`run_load` runs in this process or in a load job on another node. Its arguments and its result are plain data, and the
results of several jobs can be merged. Times are seconds since the load began. This module does not know deployments.
"""

import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.figures import CANCELLED, CUT, MeasurementPart, Observation, Window
from hpc_router.bench.load.native import load as native
from hpc_router.bench.load.native.records import FILLING, MEASURED, STEP, STREAM, UNKNOWN, Error, Table
from hpc_router.bench.workload import ChainStep, Workload, http_request
from hpc_router.errors import LaunchError
from hpc_router.net.protocol import CHAT

LABELS: Final = "x-expert,x-replica,x-route-reason"
_ERROR_KINDS: Final[Mapping[Error, str]] = {
    Error.CONNECT: "connect",
    Error.DISCONNECTED: "disconnected",
    Error.CUT: "disconnected",
    Error.BAD_HTTP: "bad_http",
    Error.UNFINISHED: "unfinished",
    Error.STREAM_ERROR: "stream_error",
    Error.TIMEOUT: "timeout",
    Error.LEFT: CANCELLED,
}


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """The server that receives the load: the router or a replica."""

    url: str
    token: str = field(repr=False)

    @property
    def address(self) -> tuple[str, int]:
        """Returns the host's IPv4 address and the port. Raises LaunchError for a host without an IPv4 address."""
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise LaunchError(f"{self.url}: the load generator supports plain HTTP only (valid: http://HOST:PORT)")
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port or 80, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            raise LaunchError(f"{self.url}: {error}") from error
        host, port = found[0][4][:2]
        return str(host), int(port)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The observations of one load. `cpu_share`: share of one core that the busiest load generator used. `wait_share`:
    share of time for which it waited for a core. `exceeded`: whether too many requests in flight ended the load."""

    started_at: float
    observations: Sequence[Observation]
    window: Window
    cpu_share: float
    wait_share: float
    exceeded: bool = False


def run_load(
    target: LoadTarget, config: BenchConfig, work: Workload, folder: Path, *, most_in_flight: int | None = None
) -> LoadResult:
    """Sends the load, and returns the result when all measured requests have ended. `folder`: a private folder for the
    program's files. `most_in_flight`: requests in flight above which a load with arrival times ends early."""
    host, port = target.address
    folder.mkdir(parents=True, exist_ok=True)
    requests = [http_request(one.body, host=f"{host}:{port}", path=CHAT, token=target.token) for one in work.bodies]
    load_s = None if config.duration_s is None else config.warmup_s + config.duration_s
    spec = native.LoadSpec(
        requests=native.write_requests(folder / "requests", requests),
        host=host,
        port=port,
        connections=work.connections,
        seconds=load_s,
        count=work.count,
        arrivals_s=work.arrivals_s,
        order=None if work.chains is not None else work.measured_order,
        others=None if work.chains is not None else work.unmeasured_order,
        chains=None if work.chains is None else _chain_table(work.chains),
        most_in_flight=most_in_flight,
        measure_s=config.warmup_s,
        think_s=work.think_s,
        ramp_s=config.warmup_s,
        events=True,
        label=LABELS,
        timeout_s=config.timeout_s,
        drain_s=config.drain_s,
    )
    started_at = time.time()
    timeout_s = None if load_s is None else load_s + config.drain_s + native.EXIT_TIMEOUT_S
    try:
        recorded = native.run(spec, folder, timeout_s=timeout_s)
    finally:
        (folder / "requests").unlink(missing_ok=True)  # the file contains the token
    elapsed_s = recorded.elapsed_s or 1.0
    seen = list(observations(recorded, work))
    return LoadResult(
        started_at,
        seen,
        window_of(config, seen),
        recorded.cpu_s / elapsed_s,
        float(recorded.summary["waited_s"]) / elapsed_s,
        bool(recorded.summary["exceeded"]),
    )


def _chain_table(chains: Sequence[ChainStep]) -> Table:
    rows = [(one.request, one.leave_events, one.pause_s, one.last, 0) for one in chains]
    return np.array(rows, dtype=STEP)


def window_of(config: BenchConfig, seen: Sequence[Observation]) -> Window:
    """Returns the measured window of a load: from `warmup_s` on, for `duration_s`. If `config` has no `duration_s`, the
    window ends with the last measured request in `seen`."""
    if config.duration_s is not None:
        return Window(config.warmup_s, config.warmup_s + config.duration_s)
    last = max((o.ended_s for o in seen if o.part is MeasurementPart.MEASURED), default=config.warmup_s)
    return Window(config.warmup_s, last)


def observations(recorded: native.Recorded, work: Workload) -> Iterable[Observation]:
    """Returns the requests in `recorded`, in the order in which they ended. With given arrival times, a request starts
    at its arrival time, even if it then waits for a free connection."""
    zero, labels = int(recorded.summary["begun"]), [None, *recorded.summary["labels"]]
    events = recorded.events[np.argsort(recorded.events["sequence"], kind="stable")]
    starts = np.searchsorted(events["sequence"], recorded.requests["sequence"])
    ends = np.searchsorted(events["sequence"], recorded.requests["sequence"], side="right")
    times = (events["at"] - zero) / 1e9
    for row, start, end in zip(recorded.requests, starts, ends, strict=True):
        content = times[start:end].tolist()
        part = _part(int(row["flags"]))
        yield Observation(
            part=part,
            user=int(row["connection"]),
            started_s=(int(row["due"]) - zero) / 1e9,
            ended_s=(int(row["end"]) - zero) / 1e9,
            content_s=content,
            tokens=None if row["tokens"] == UNKNOWN else int(row["tokens"]),
            prompt_tokens=None if row["prompt_tokens"] == UNKNOWN else int(row["prompt_tokens"]),
            cached_tokens=None if row["cached_tokens"] == UNKNOWN else int(row["cached_tokens"]),
            status=int(row["status"]) or None,
            expert=_label(labels, row["label"]),
            replica=_label(labels, row["second"]),
            reason=_label(labels, row["third"]),
            domain=work.bodies[int(row["prompt"])].domain,
            load_class=work.bodies[int(row["prompt"])].load_class,
            turn=work.bodies[int(row["prompt"])].turn,
            question=int(row["prompt"]),
            error=_kind(row, part, content),
        )


def _part(flags: int) -> MeasurementPart:
    if flags & MEASURED:
        return MeasurementPart.MEASURED
    return MeasurementPart.FILLING if flags & FILLING else MeasurementPart.WARM_UP


def _label(labels: Sequence[str | None], position: int) -> str | None:
    return labels[position] if position < len(labels) else None


def _kind(row: Any, part: MeasurementPart, content: Sequence[float]) -> str | None:
    error = Error(row["error"])
    if error is Error.HTTP_STATUS:
        return f"http_{row['status']}"
    if error is Error.STOPPED:
        return "unended" if part is MeasurementPart.MEASURED else CUT
    if error is not Error.NONE:
        return _ERROR_KINDS[error]
    if not row["flags"] & STREAM:
        return "not_a_stream"
    return None if content else "no_content"


def merged(loads: Sequence[LoadResult]) -> LoadResult:
    """Returns the combined result of several load generators that began at the same time, each with its own clock."""
    first = loads[0]
    return LoadResult(
        min(load.started_at for load in loads),
        [o for load in loads for o in load.observations],
        Window(first.window.start_s, max(load.window.end_s for load in loads)),
        max(load.cpu_share for load in loads),
        max(load.wait_share for load in loads),
        any(load.exceeded for load in loads),
    )


def from_json(value: Mapping[str, Any]) -> LoadResult:
    seen = [Observation(**{**one, "part": MeasurementPart(one["part"])}) for one in value["observations"]]
    shares = value["cpu_share"], value["wait_share"]
    return LoadResult(value["started_at"], seen, Window(**value["window"]), *shares, value["exceeded"])
