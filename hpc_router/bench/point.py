"""Measures one point (one load) on a running deployment: with the router, and on request also without it.

Without the router, each replica gets as many users as its share of the routed requests, and the prompts that the router
has sent to it. On odd repeats the measurement without the router comes first, so that warm caches do not always favour
the same side.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.figures import Figures, MeasurementPart, Observation, Window, faster, figures
from hpc_router.bench.load.generator import LoadResult, LoadTarget, merged, run_load
from hpc_router.bench.load.load_jobs import LoadJobs, start_load_jobs
from hpc_router.bench.overhead import overhead, split_users
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.validity import Conditions, invalid_reasons
from hpc_router.bench.workload import Point, workload
from hpc_router.cluster.commands.router_access import router_access
from hpc_router.errors import LaunchError
from hpc_router.net.auth import replica_key
from hpc_router.net.http_client import Unreachable, call_blocking
from hpc_router.net.protocol import METRICS
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State
from hpc_router.state.run_directory import RunDir

STEP_SECONDS: Final = "hpc_router_sim_step_seconds_total"
LOST_SECONDS: Final = "hpc_router_sim_lost_seconds_total"


ServedExpert = tuple[str, str]
"""The name of a replica, and the name of one of the experts that it serves."""


@dataclass(frozen=True, slots=True)
class RoutedShares:
    """How the router distributed the measured requests. `shares`: by replica and expert, their share of the requests.
    `bodies`: by replica and expert, indices of the bodies of their requests in the workload."""

    shares: Mapping[ServedExpert, float]
    bodies: Mapping[ServedExpert, Sequence[int]]

    @classmethod
    def of(cls, observations: Sequence[Observation]) -> "RoutedShares":
        good = [o for o in observations if o.part is MeasurementPart.MEASURED and o.error is None and o.replica]
        bodies: dict[ServedExpert, set[int]] = {}
        counts: dict[ServedExpert, int] = {}
        for o in good:
            assert o.replica is not None
            at = (o.replica, o.expert or "")
            counts[at] = counts.get(at, 0) + 1
            if o.question is not None:
                bodies.setdefault(at, set()).add(o.question)
        return cls(
            {name: count / len(good) for name, count in sorted(counts.items())},
            {name: sorted(indices) for name, indices in bodies.items()},
        )


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """The figures of one measurement point. `invalid`: reasons why the figures are invalid; empty if they are valid.
    `direct`: figures without the router, and `overhead`: latency that the router adds; both None if they were not
    measured, and `notes` then says why."""

    point: Point
    load: LoadResult
    figures: Figures
    invalid: Sequence[str]
    direct: Figures | None = None
    overhead: Mapping[str, Mapping[str, float]] | None = None
    notes: Sequence[str] = ()


@dataclass(slots=True)
class PointMeasurement:
    """Measures points on one deployment. `slowdown`: wall-clock seconds per simulated second of the deployment's
    engines. `routed`: how the router distributed the load of each point measured so far."""

    run: RunDir
    target: LoadTarget
    config: BenchConfig
    prompts: Sequence[BenchPrompt]
    load_jobs: LoadJobs
    folder: Path
    slowdown: float = 1.0
    routed: dict[tuple[object, ...], RoutedShares] = field(default_factory=dict)

    def measure(self, point: Point) -> MeasuredPoint:
        """Measures one point and returns its figures. Raises LaunchError."""
        key = (point.users, point.rate_per_s, point.trace)
        notes: list[str] = []
        direct = None
        measures_direct = self._measures_direct(point, notes)
        if measures_direct and point.repeat % 2 and key in self.routed:
            direct = self._direct(point, self.routed[key], notes)
        before = self._sim_seconds()
        load = self.load_jobs.run(self.target, self.config, self.prompts, point)
        late_share = _late_share(before, self._sim_seconds())
        if measures_direct and direct is None:
            self.routed[key] = RoutedShares.of(load.observations)
            direct = self._direct(point, self.routed[key], notes)
        found = self._figures(load)
        conditions = Conditions(point.users, load.cpu_share, load.wait_share, late_share, _responses_per_half(load))
        invalid = list(invalid_reasons(found, conditions, self.config.trust))
        return MeasuredPoint(
            point, load, found, invalid, direct, None if direct is None else overhead(found, direct), notes
        )

    def _figures(self, load: LoadResult) -> Figures:
        window = Window(load.window.start_s / self.slowdown, load.window.end_s / self.slowdown)
        observations = load.observations if self.slowdown == 1.0 else faster(load.observations, self.slowdown)
        return figures(observations, window, self.config.good, exceeded=load.exceeded)

    def _measures_direct(self, point: Point, notes: list[str]) -> bool:
        """Returns whether to measure this point without the router. If `bench.direct` asks for this and it is not
        possible, adds the reason to `notes`."""
        if not self.config.direct:
            return False
        if self.slowdown != 1.0:
            notes.append(
                "the router's overhead was not measured: the simulated engines are slowed down, the router is not"
            )
            return False
        if point.users is None:
            notes.append("the router's overhead is measured in a closed loop only")
            return False
        return True

    def _direct(self, point: Point, routed: RoutedShares, notes: list[str]) -> Figures | None:
        """Measures `point` without the router and returns its figures; if this is not possible, adds the reason to
        `notes` and returns None. Loads all replicas at once, each with its share (in `routed`) of the users."""
        assert point.users is not None
        replicas = {name: self._replica(name) for name, _ in routed.shares}
        targets = {
            (name, expert): replica
            for name, expert in routed.shares
            if (replica := replicas[name]) is not None and expert in replica[0].serves
        }
        if not targets:
            notes.append("the router's overhead was not measured: no replica accepts requests without the router")
            return None
        total = point.users
        users = split_users(total, {served: routed.shares[served] for served in targets})

        def load_one(served: ServedExpert) -> LoadResult:
            (name, expert), (record, target) = served, targets[served]
            config = replace(self.config, load_jobs=1, model=record.serves[expert] or expert)
            work = workload(config, self.prompts, replace(point, users=users[served]))
            bodies = set(routed.bodies.get(served, ()))
            order = [number for number in work.measured_order if number in bodies] or work.measured_order
            count = None if config.requests is None else max(1, round(config.requests * users[served] / total))
            work = replace(work, measured_order=order, unmeasured_order=order, count=count)
            load = run_load(target, config, work, self.folder / f"{name}.{expert}")
            return replace(load, observations=[replace(o, expert=expert, replica=name) for o in load.observations])

        with ThreadPoolExecutor(len(users)) as pool:
            return self._figures(merged(list(pool.map(load_one, users))))

    def _replica(self, name: str) -> tuple[Record, LoadTarget] | None:
        """Returns the record and address of a replica. Returns None for an external endpoint, because its token is
        unknown here."""
        record = RegistryReader(self.run.registry).snapshot().get(name)
        if record is None or record.kind is not RecordKind.EXPERT or record.nonce is None:
            return None
        return record, LoadTarget(record.url, replica_key(self.run.secret(), record.nonce))

    def _sim_seconds(self) -> dict[str, tuple[float, float]]:
        """Returns for each simulated replica two totals in seconds: the simulated duration of its engine's steps, and
        by how much these steps were late without later steps making up for it."""
        seconds = {}
        for name, record in RegistryReader(self.run.registry).snapshot().items():
            if record.kind is RecordKind.EXPERT and record.engine.kind == "sim" and record.state is State.READY:
                replica = self._replica(name)
                text = _metrics(replica[1]) if replica is not None else ""
                if STEP_SECONDS in text:
                    seconds[name] = (_value(text, STEP_SECONDS), _value(text, LOST_SECONDS))
        return seconds


@contextmanager
def point_measurement(
    run: RunDir,
    config: BenchConfig,
    prompts: Sequence[BenchPrompt],
    *,
    deployment: Mapping[str, Any] | None,
    shared: Path,
) -> Iterator[PointMeasurement]:
    """Starts the load jobs, yields the object that measures points on the running deployment of `run`, and ends the
    load jobs after the block.

    `deployment`: its resolved config; None if unknown. `shared`: folder through which the load jobs communicate.
    """
    access, slowdown = router_access(run), _slowdown(deployment)
    with (
        tempfile.TemporaryDirectory(prefix="hpc-router-bench-") as scratch,
        start_load_jobs(config, shared=shared) as load_jobs,
    ):
        target = LoadTarget(access.url, access.token)
        yield PointMeasurement(run, target, config, prompts, load_jobs, Path(scratch), slowdown)


def _metrics(target: LoadTarget) -> str:
    try:
        return str(call_blocking("GET", f"{target.url}{METRICS}", token=target.token).body)
    except Unreachable:
        return ""


def _value(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.split("\n") if line.startswith(name))


def _late_share(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> float | None:
    """Returns by how much the simulated engines were late between `before` and `after`, two results of `_sim_seconds`:
    as a share of an engine's computing time, the maximum over all replicas. Returns None if no replica is simulated."""
    shares = []
    for name, (steps_s, lost_s) in after.items():
        earlier = before.get(name, (0.0, 0.0))
        if steps_s > earlier[0]:
            shares.append((lost_s - earlier[1]) / (steps_s - earlier[0]))
    return max(shares, default=None) if after else None


def _responses_per_half(load: LoadResult) -> tuple[int, int]:
    """Returns how many responses ended in the first and in the second half of the load's measured window."""
    middle = (load.window.start_s + load.window.end_s) / 2
    ended = [o.ended_s for o in load.observations if o.error is None and load.window.contains(o.ended_s)]
    return sum(at <= middle for at in ended), sum(at > middle for at in ended)


def _slowdown(deployment: Mapping[str, Any] | None) -> float:
    """Returns `roofline.slowdown` of the simulated experts. Raises LaunchError if the experts have different values,
    because their times could then not be compared."""
    found: set[float] = set()
    for expert in (deployment or {"experts": {}})["experts"].values():
        if expert["engine"]["kind"] == "sim":
            roofline = expert["engine"]["options"].get("roofline")
            found.add(float(str(roofline.get("slowdown") or 1.0)) if isinstance(roofline, Mapping) else 1.0)
    if len(found) > 1:
        values = ", ".join(map(str, sorted(found)))
        raise LaunchError(f"roofline.slowdown differs between experts ({values}): give all the same value")
    return found.pop() if found else 1.0
