"""What is measured of one relay that runs, as figures by name. Times are CLOCK_MONOTONIC, the same in all processes.

CPU is taken between two moments in the midst of the load, and divided by the requests, or events, that arrived between
the same two. Every request and every event is counted; what failed is counted by kind and makes the round a failed one.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from hpc_router.bench.load.native.engine import MockEngine
from hpc_router.bench.load.native.load import GUARD_S, LoadSpec, Recorded, run, running, write_requests
from hpc_router.bench.load.native.records import Error, Table, errors
from hpc_router.bench.relay_cost import requests
from hpc_router.bench.relay_cost.cpu_time import Cost, Meter, await_quiet
from hpc_router.bench.relay_cost.interface import Relay, StartedRelay
from hpc_router.bench.relay_cost.options import LOWER, RelayCostOptions
from hpc_router.bench.relay_cost.processes import Cores

RUN_UP_S: Final = 0.3
"""Of short requests, before they count."""
TURNS: Final = 5
PER_S_RAMP: Final = 1000
"""Streams that begin in a second."""
ASKS_PER_S: Final = 50
"""Requests for the time to first token beside open streams."""
NOTICE_S: Final = 10.0
"""An engine's connection that is still open so long after the client has left counts as not closed."""
NO_ANSWER_MS: Final = 60_000


@dataclass(slots=True)
class Round:
    """One relay's figures of one round; `failed` by workload and kind."""

    figures: dict[str, float] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def fail(self, workload: str, kinds: Mapping[str, int]) -> None:
        for kind, count in kinds.items():
            if count:
                key = f"{workload}: {kind}"
                self.failed[key] = self.failed.get(key, 0) + count


@dataclass(slots=True)
class Measurement:
    """`place`: a folder of its own for what is sent and recorded."""

    options: RelayCostOptions
    relay: Relay
    started: StartedRelay
    engine: MockEngine
    place: Path
    cores: Cores
    tell: Callable[[str], None]
    round: Round = field(default_factory=Round)

    @property
    def _meter(self) -> Meter:
        return Meter(self.started.group, self.engine.pid, self.cores)

    def all(self) -> Round:
        streams = self.options.streams
        self._short("200 B", requests.MODEL, span_s=min(1.0, self.options.seconds))  # and forget it
        self.first_token()
        for size in requests.SIZES if self.relay.classifies else ("200 B",):
            self.short(size)
        if self.relay.hops < 2:
            self.streams(streams, suffix="")
            self.streams(max(1, streams // 2), suffix="_half")
        if self.relay.hops > 1 or self.relay.classifies:
            self.streams(max(1, streams // LOWER), suffix="_lower")
        self.leave("mid", delay_ms=0)
        self.leave("before", delay_ms=NO_ANSWER_MS)
        return self.round

    def short(self, size: str) -> None:
        """Closed loops of short answers over kept connections: for a named model, and beside it for `auto`, in turns,
        so that both meet the machine in the same mood. A figure is the median of its turns."""
        models = (requests.MODEL, "auto") if self.relay.classifies else (requests.MODEL,)
        turns: dict[str, list[dict[str, float]]] = {model: [] for model in models}
        for _ in range(TURNS):
            self._begin(f"short requests of {size}")
            for model, found in turns.items():
                found.append(self._short(size, model, span_s=self.options.seconds / TURNS))
        for model, found in turns.items():
            name = f"short_{size.replace(' ', '')}" + ("_auto" if model == "auto" else "")
            self._keep(name, **{key: median(one[key] for one in found) for key in found[0]})

    def _short(self, size: str, model: str, *, span_s: float) -> dict[str, float]:
        sent = requests.short(self.started.port, token=self.started.token, size=size, model=model)
        load = self._load(sent, seconds=RUN_UP_S + span_s + 0.1)
        with running(load, self.place / "load") as under_way:
            cost = self._meter.over(under_way, after_s=RUN_UP_S, span_s=span_s)
            found = under_way.wait(patience_s=load.drain_s + GUARD_S)
        self._check(f"{size} requests for {model}", found)
        ended = _within(found.requests, "end", cost)
        ended = ended[ended["error"] == Error.NONE]
        took_ms = (ended["end"] - ended["begin"]) / 1e6
        return {
            **cost.shares(len(ended)),
            "ms_p50": _percentile(took_ms, 50),
            "ms_p99": _percentile(took_ms, 99),
        }

    def first_token(self) -> None:
        """One request at a time, one event each: from its begin to that event."""
        self._begin("time to first token")
        sent = requests.streaming(self.started.port, token=self.started.token, events=1)
        found = run(
            self._load(sent, connections=1, count=self.options.asks), self.place / "load", patience_s=60 + GUARD_S
        )
        self._check("first token", found)
        self._keep_first_token("ttft", found)

    def first_token_beside(self, span_s: float) -> None:
        """The same while all streams are open: requests at given times, few enough to be no load of their own."""
        arrivals_s = np.arange(0, span_s, 1 / ASKS_PER_S).tolist()
        sent = requests.streaming(self.started.port, token=self.started.token, events=1)
        load = self._load(sent, "asks", connections=len(arrivals_s), arrivals_s=arrivals_s)
        found = run(load, self.place / "asks", patience_s=span_s + load.timeout_s + GUARD_S)
        self._check("first token beside streams", found)
        self._keep_first_token("ttft_beside", found)

    def streams(self, count: int, *, suffix: str) -> None:
        """All open at once; what arrives while they are is counted."""
        options, ramp_s = self.options, max(0.2, count / PER_S_RAMP)
        self._begin(f"{count} streams")
        asked_s = 0.0 if suffix else options.asked_s
        events = max(1, round(options.rate * (ramp_s + 2 * options.settle_s + options.seconds + asked_s)))
        sent = requests.streaming(self.started.port, token=self.started.token, events=events)
        load = self._load(sent, connections=count, count=count, ramp_s=ramp_s, events=True)
        before = self.engine.lateness()
        with running(load, self.place / "load") as under_way:
            cost = self._meter.over(under_way, after_s=ramp_s + options.settle_s, span_s=options.seconds)
            memory_mb = self.started.group.private_mb() if self.started.group else 0.0
            if asked_s:
                self.first_token_beside(asked_s)
            found = under_way.wait(patience_s=events / options.rate + load.drain_s + load.timeout_s + GUARD_S)
        late = self.engine.lateness().since(before)
        rows = found.requests
        self._check(f"{count} streams", found)
        ended_well = rows["error"] == Error.NONE
        whole = np.count_nonzero(ended_well & (rows["events"] == events))
        self.round.fail(f"{count} streams", {"incomplete": int(np.count_nonzero(ended_well) - whole)})
        arrived = _within(found.events, "at", cost)
        hops_ms = arrived["hop"][arrived["hop"] >= 0] / 1e6
        begun = rows[rows["first_event"] > 0]
        open_all = np.count_nonzero((rows["begin"] <= cost.begin.at_ns) & (rows["end"] >= cost.end.at_ns))
        self._keep(
            f"stream{suffix}",
            **cost.shares(len(arrived)),
            hop_ms_p50=_percentile(hops_ms, 50),
            hop_ms_p99=_percentile(hops_ms, 99),
            hop_ms_max=_percentile(hops_ms, 100),
            ttft_ms_p50=_percentile((begun["first_event"] - begun["begin"]) / 1e6, 50),
            opened=float(open_all),
            complete=float(whole),
            private_mb=memory_mb,
            engine_late_ms_p99=late.within_ms(0.99),
        )

    def leave(self, when: str, *, delay_ms: int) -> None:
        """Clients that close their connection: how long until the engine's is closed."""
        self._begin(f"clients that leave {'in the midst of a stream' if when == 'mid' else 'before the first byte'}")
        names = [f"{when}-{number}" for number in range(self.options.leavers)]
        sent = requests.leaving(self.started.port, token=self.started.token, names=names, delay_ms=delay_ms)
        leaving: dict[str, Any] = {"leave_after_ms": 50} if delay_ms else {"leave_after_events": 3}
        load = self._load(sent, connections=min(5, len(names)), count=len(names), **leaving)
        found = run(load, self.place / "load", patience_s=60 + GUARD_S)
        rows = found.requests
        self.round.fail(f"leave {when}", {k: v for k, v in errors(rows).items() if k != Error.LEFT.name.lower()})
        left_at = {names[row["prompt"]]: int(row["end"]) for row in rows if row["error"] == Error.LEFT}
        deadline = time.monotonic() + NOTICE_S
        while not set(left_at) <= set(noted := self.engine.leaves()) and time.monotonic() < deadline:
            time.sleep(0.02)
        took_ms = np.array([max(0, noted[name] - at) / 1e6 for name, at in left_at.items() if name in noted])
        self.round.fail(f"leave {when}", {"never closed": len(left_at) - len(took_ms)})
        self._keep(f"leave_{when}", ms_p50=_percentile(took_ms, 50), ms_max=_percentile(took_ms, 100))

    def soak(self, total: int, *, step: int = 100_000) -> list[tuple[int, float]]:
        """Private memory in MiB after so many short requests."""
        assert self.started.group is not None
        sent = requests.short(self.started.port, token=self.started.token, size="200 B")
        points, done = [(0, self.started.group.private_mb())], 0
        while done < total:
            count = min(step, total - done)
            self.tell(f"{done} of {total} requests")
            found = run(self._load(sent, count=count), self.place / "load", patience_s=count / 100 + 60)
            self._check("soak", found)
            done += count
            points.append((done, self.started.group.private_mb()))
        return points

    def _begin(self, what: str) -> None:
        if self.options.quiet_s:
            self.tell(f"{what}: waiting for others to rest")
            await_quiet(self.cores, limit_s=self.options.quiet_s)
        self.tell(what)

    def _load(self, sent: list[bytes], name: str = "load", *, connections: int | None = None, **how: Any) -> LoadSpec:
        path = write_requests(self.place / f"{name}.requests", sent)
        given = self.options.connections if connections is None else connections
        return LoadSpec(requests=path, port=self.started.port, connections=given, **how)

    def _check(self, workload: str, found: Recorded) -> None:
        self.round.fail(workload, errors(found.requests))
        self.round.fail(workload, {"unsolicited answers": int(found.summary["unsolicited"])})
        if not len(found.requests):
            self.round.fail(workload, {"no requests": 1})

    def _keep_first_token(self, name: str, found: Recorded) -> None:
        good = found.requests[found.requests["first_event"] > 0]
        took_ms = (good["first_event"] - good["begin"]) / 1e6
        self._keep(name, ms_p50=_percentile(took_ms, 50), ms_p99=_percentile(took_ms, 99))

    def _keep(self, name: str, **figures: float) -> None:
        self.round.figures |= {f"{name}_{key}": float(value) for key, value in figures.items()}


def _within(rows: Table, column: str, cost: Cost) -> Table:
    return rows[(rows[column] >= cost.begin.at_ns) & (rows[column] < cost.end.at_ns)]


def _percentile(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], share: float) -> float:
    """NaN of nothing."""
    return float(np.percentile(values, share)) if len(values) else float("nan")
