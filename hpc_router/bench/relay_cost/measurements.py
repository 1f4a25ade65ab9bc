"""The measurements of one running relay, as figures by name. All times are CLOCK_MONOTONIC, as in load generator and
engine.

CPU time is read twice during the load, and the difference is divided by the number of requests or events in between.
Failed requests are counted by kind of error; a round with failed requests counts as failed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from hpc_router.bench.load.native.engine import MockEngine
from hpc_router.bench.load.native.load import EXIT_TIMEOUT_S, LoadSpec, Recorded, run, running, write_requests
from hpc_router.bench.load.native.records import Error, Table, errors
from hpc_router.bench.relay_cost import requests
from hpc_router.bench.relay_cost.cpu_time import CpuCost, Meter, wait_for_idle
from hpc_router.bench.relay_cost.interface import Relay, StartedRelay
from hpc_router.bench.relay_cost.options import LOWER_LOAD_DIVISOR, RelayCostOptions
from hpc_router.bench.relay_cost.processes import Cores

RAMP_S: Final = 0.3
"""Time in seconds in which short requests are sent before the measurement starts."""
TURNS: Final = 5
STREAM_STARTS_PER_S: Final = 1000
PROBES_PER_S: Final = 50
"""Rate of the requests that measure the time to first token while streams are open."""
CLOSE_TIMEOUT_S: Final = 10.0
"""Time in seconds after a client's disconnect. A connection to the engine that is then still open counts as never
closed."""
NO_RESPONSE_MS: Final = 60_000


@dataclass(slots=True)
class Round:
    """The figures of one relay in one round. `failed`: number of failed requests by workload and kind of error."""

    figures: dict[str, float] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def fail(self, workload: str, kinds: Mapping[str, int]) -> None:
        for kind, count in kinds.items():
            if count:
                key = f"{workload}: {kind}"
                self.failed[key] = self.failed.get(key, 0) + count


@dataclass(slots=True)
class Measurement:
    """Measures one running relay. `place`: a private folder for the load generator's files. `show`: displays the
    current step."""

    options: RelayCostOptions
    relay: Relay
    started: StartedRelay
    engine: MockEngine
    place: Path
    cores: Cores
    show: Callable[[str], None]
    round: Round = field(default_factory=Round)

    @property
    def _meter(self) -> Meter:
        return Meter(self.started.group, self.engine.pid, self.cores)

    def all(self) -> Round:
        """Runs all measurements of a round and returns the figures."""
        streams = self.options.streams
        self._short("200 B", requests.MODEL, span_s=min(1.0, self.options.seconds))  # warm-up
        self.first_token()
        for size in requests.SIZES if self.relay.classifies else ("200 B",):
            self.short(size)
        if self.relay.hops < 2:
            self.streams(streams, suffix="")
            self.streams(max(1, streams // 2), suffix="_half")
        if self.relay.hops > 1 or self.relay.classifies:
            self.streams(max(1, streams // LOWER_LOAD_DIVISOR), suffix="_lower")
        self.disconnect("mid", delay_ms=0)
        self.disconnect("before", delay_ms=NO_RESPONSE_MS)
        return self.round

    def short(self, size: str) -> None:
        """Measures short requests over keep-alive connections, each of which sends its next request after the response.
        `size`: a key of `requests.SIZES`. A figure is the median of several measurements.

        Measurements for a named model and for `auto` alternate, so that changes of the machine's speed affect both
        alike.
        """
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
        spec = self._spec(sent, seconds=RAMP_S + span_s + 0.1)
        with running(spec, self.place / "load") as load:
            cost = self._meter.measure(load, after_s=RAMP_S, span_s=span_s)
            found = load.wait(timeout_s=spec.drain_s + EXIT_TIMEOUT_S)
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
        """Measures the time to first token: sends one request after the other, each for a response of one event."""
        self._begin("time to first token")
        sent = requests.streaming(self.started.port, token=self.started.token, events=1)
        spec = self._spec(sent, connections=1, count=self.options.first_token_requests)
        found = run(spec, self.place / "load", timeout_s=60 + EXIT_TIMEOUT_S)
        self._check("first token", found)
        self._keep_first_token("ttft", found)

    def first_token_beside(self, span_s: float) -> None:
        """Measures the time to first token for `span_s` seconds, while the streams of `streams` are open. Sends so few
        requests that they do not change the load."""
        arrivals_s = np.arange(0, span_s, 1 / PROBES_PER_S).tolist()
        sent = requests.streaming(self.started.port, token=self.started.token, events=1)
        spec = self._spec(sent, "probes", connections=len(arrivals_s), arrivals_s=arrivals_s)
        found = run(spec, self.place / "probes", timeout_s=span_s + spec.timeout_s + EXIT_TIMEOUT_S)
        self._check("first token beside streams", found)
        self._keep_first_token("ttft_beside", found)

    def streams(self, count: int, *, suffix: str) -> None:
        """Measures `count` simultaneous streams. The figures come from the events that arrive while all streams are
        open, and their names end in `suffix`."""
        options, ramp_s = self.options, max(0.2, count / STREAM_STARTS_PER_S)
        self._begin(f"{count} streams")
        beside_s = 0.0 if suffix else options.beside_streams_s
        events = max(1, round(options.rate * (ramp_s + 2 * options.settle_s + options.seconds + beside_s)))
        sent = requests.streaming(self.started.port, token=self.started.token, events=events)
        spec = self._spec(sent, connections=count, count=count, ramp_s=ramp_s, events=True)
        before = self.engine.lateness()
        with running(spec, self.place / "load") as load:
            cost = self._meter.measure(load, after_s=ramp_s + options.settle_s, span_s=options.seconds)
            memory_mb = self.started.group.private_mb() if self.started.group else 0.0
            if beside_s:
                self.first_token_beside(beside_s)
            timeout_s = events / options.rate + spec.drain_s + spec.timeout_s + EXIT_TIMEOUT_S
            found = load.wait(timeout_s=timeout_s)
        late = self.engine.lateness().since(before)
        rows = found.requests
        self._check(f"{count} streams", found)
        succeeded = rows["error"] == Error.NONE
        complete = np.count_nonzero(succeeded & (rows["events"] == events))
        self.round.fail(f"{count} streams", {"incomplete": int(np.count_nonzero(succeeded) - complete)})
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
            complete=float(complete),
            private_mb=memory_mb,
            engine_late_ms_p99=late.within_ms(0.99),
        )

    def disconnect(self, when: str, *, delay_ms: int) -> None:
        """Measures how fast the relay closes its connection to the engine after its client disconnects. `when`: `mid`
        for a disconnect in the middle of a stream, `before` for one before the first byte. `delay_ms`: time until the
        engine sends the first event."""
        self._begin(f"clients that disconnect {'in mid-stream' if when == 'mid' else 'before the first byte'}")
        names = [f"{when}-{number}" for number in range(self.options.disconnects)]
        sent = requests.disconnecting(self.started.port, token=self.started.token, names=names, delay_ms=delay_ms)
        trigger: dict[str, Any] = {"leave_after_ms": 50} if delay_ms else {"leave_after_events": 3}
        spec = self._spec(sent, connections=min(5, len(names)), count=len(names), **trigger)
        rows = run(spec, self.place / "load", timeout_s=60 + EXIT_TIMEOUT_S).requests
        self.round.fail(f"leave {when}", {k: v for k, v in errors(rows).items() if k != Error.LEFT.name.lower()})
        left_at = {names[row["prompt"]]: int(row["end"]) for row in rows if row["error"] == Error.LEFT}
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while not set(left_at) <= set(closed := self.engine.disconnects()) and time.monotonic() < deadline:
            time.sleep(0.02)
        took_ms = np.array([max(0, closed[name] - at) / 1e6 for name, at in left_at.items() if name in closed])
        self.round.fail(f"leave {when}", {"never closed": len(left_at) - len(took_ms)})
        self._keep(f"leave_{when}", ms_p50=_percentile(took_ms, 50), ms_max=_percentile(took_ms, 100))

    def soak(self, total: int, *, step: int = 100_000) -> list[tuple[int, float]]:
        """Sends `total` short requests, and returns the private memory of the relay as pairs (requests sent so far,
        MiB): before the first request and after every `step` requests."""
        assert self.started.group is not None
        sent = requests.short(self.started.port, token=self.started.token, size="200 B")
        points, done = [(0, self.started.group.private_mb())], 0
        while done < total:
            count = min(step, total - done)
            self.show(f"{done} of {total} requests")
            found = run(self._spec(sent, count=count), self.place / "load", timeout_s=count / 100 + 60)
            self._check("soak", found)
            done += count
            points.append((done, self.started.group.private_mb()))
        return points

    def _begin(self, what: str) -> None:
        if self.options.quiet_s:
            self.show(f"{what}: waiting until other processes are idle")
            wait_for_idle(self.cores, timeout_s=self.options.quiet_s)
        self.show(what)

    def _spec(self, sent: list[bytes], name: str = "load", *, connections: int | None = None, **how: Any) -> LoadSpec:
        path = write_requests(self.place / f"{name}.requests", sent)
        connections = self.options.connections if connections is None else connections
        return LoadSpec(requests=path, port=self.started.port, connections=connections, **how)

    def _check(self, workload: str, found: Recorded) -> None:
        self.round.fail(workload, errors(found.requests))
        self.round.fail(workload, {"unsolicited data": int(found.summary["unsolicited"])})
        if not len(found.requests):
            self.round.fail(workload, {"no requests": 1})

    def _keep_first_token(self, name: str, found: Recorded) -> None:
        good = found.requests[found.requests["first_event"] > 0]
        took_ms = (good["first_event"] - good["begin"]) / 1e6
        self._keep(name, ms_p50=_percentile(took_ms, 50), ms_p99=_percentile(took_ms, 99))

    def _keep(self, name: str, **figures: float) -> None:
        self.round.figures |= {f"{name}_{key}": float(value) for key, value in figures.items()}


def _within(rows: Table, column: str, cost: CpuCost) -> Table:
    """Returns the rows whose time in `column` lies in the interval of `cost`."""
    return rows[(rows[column] >= cost.begin.at_ns) & (rows[column] < cost.end.at_ns)]


def _percentile(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], share: float) -> float:
    """Returns the value at `share` percent of the sorted values, interpolated; NaN without values."""
    return float(np.percentile(values, share)) if len(values) else float("nan")
