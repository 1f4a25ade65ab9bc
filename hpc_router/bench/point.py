"""One point of a running deployment: through the router, beside it straight at the replicas, and what it was worth.

Straight at the replicas, each gets as many users as its share through the router was, and of the prompts those that the
router gave its expert. On odd repeats that comes first, so that what one leaves behind in caches does not always favour
the same.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.figures import Figures, GoodputLimits, MeasurementPart, Observation, Window, faster, figures
from hpc_router.bench.load.generator import LoadResult, LoadTarget, carry_out, merged
from hpc_router.bench.load.load_jobs import LoadJobs
from hpc_router.bench.overhead import overhead, split
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.validity import Conditions, doubts
from hpc_router.bench.workload import Point, workload
from hpc_router.errors import LaunchError
from hpc_router.net.auth import replica_key
from hpc_router.net.http_client import Unreachable, call_blocking
from hpc_router.net.protocol import METRICS
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State
from hpc_router.state.run_directory import RunDir

STEPS: Final = "hpc_router_sim_step_seconds_total"
LOST: Final = "hpc_router_sim_lost_seconds_total"


Served = tuple[str, str]
"""A replica, and one of the experts that it serves."""


@dataclass(frozen=True, slots=True)
class Split:
    """Through the router, of each expert on each replica: its share, and which questions it got."""

    shares: Mapping[Served, float]
    questions: Mapping[Served, Sequence[int]]

    @classmethod
    def of(cls, seen: Sequence[Observation]) -> "Split":
        good = [o for o in seen if o.part is MeasurementPart.MEASURED and o.error is None and o.replica]
        asked: dict[Served, set[int]] = {}
        counts: dict[Served, int] = {}
        for o in good:
            assert o.replica is not None
            at = (o.replica, o.expert or "")
            counts[at] = counts.get(at, 0) + 1
            if o.question is not None:
                asked.setdefault(at, set()).add(o.question)
        return cls(
            {name: count / len(good) for name, count in sorted(counts.items())},
            {name: sorted(found) for name, found in asked.items()},
        )


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """`direct`, `added`: None where that was not asked for, or could not be. `notes`: why not."""

    point: Point
    load: LoadResult
    found: Figures
    invalid: Sequence[str]
    direct: Figures | None = None
    added: Mapping[str, Mapping[str, float]] | None = None
    notes: Sequence[str] = ()


@dataclass(slots=True)
class Bench:
    """Measures points of one deployment. `slowdown`: wall seconds per second of its simulated engines."""

    run: RunDir
    target: LoadTarget
    config: BenchConfig
    prompts: Sequence[BenchPrompt]
    crew: LoadJobs
    folder: Path
    slowdown: float = 1.0
    splits: dict[tuple[object, ...], Split] = field(default_factory=dict)

    def measure(self, point: Point) -> MeasuredPoint:
        """Raises LaunchError."""
        key = (point.users, point.rate_per_s, point.trace)
        notes: list[str] = []
        direct = None
        if self._compares(point, notes) and point.repeat % 2 and key in self.splits:
            direct = self._direct(point, self.splits[key], notes)
        before = self._simulated()
        load = self.crew.load(self.target, self.config, self.prompts, point)
        late_share = _late(before, self._simulated())
        if self._compares(point, []) and direct is None:
            self.splits[key] = Split.of(load.observations)
            direct = self._direct(point, self.splits[key], notes)
        found = self._figures(load)
        seen = Conditions(point.users, load.cpu_share, load.wait_share, late_share, _halves(load))
        added = None
        if direct is not None:
            added = overhead(found, direct)
        return MeasuredPoint(point, load, found, doubts(found, seen, self.config.trust), direct, added, notes)

    def _figures(self, load: LoadResult) -> Figures:
        good = self.config.good
        limits = GoodputLimits(good.ttft_s, good.tpot_s, good.e2e_s)
        window = Window(load.window.start_s / self.slowdown, load.window.end_s / self.slowdown)
        seen = load.observations if self.slowdown == 1.0 else faster(load.observations, self.slowdown)
        return figures(seen, window, limits)

    def _compares(self, point: Point, notes: list[str]) -> bool:
        if not self.config.direct:
            return False
        if self.slowdown != 1.0:
            notes.append("what the router adds was not measured: the engines' time is slowed down, the router's is not")
            return False
        if point.users is None:
            notes.append("what the router adds is measured in the closed loop only")
            return False
        return True

    def _direct(self, point: Point, found: Split, notes: list[str]) -> Figures | None:
        """All replicas at the same time, each of their experts with its share of the users."""
        assert point.users is not None
        replicas = {name: self._replica(name) for name, _ in found.shares}
        known = {
            (name, expert): at
            for name, expert in found.shares
            if (at := replicas[name]) is not None and expert in at[0].serves
        }
        if not known:
            notes.append("what the router adds was not measured: no replica can be asked without it")
            return None
        everybody = point.users
        users = split(everybody, {served: found.shares[served] for served in known})

        def one(served: Served) -> LoadResult:
            (name, expert), (record, target) = served, known[served]
            config = replace(self.config, load_jobs=1, model=record.serves[expert] or expert)
            work = workload(config, self.prompts, replace(point, users=users[served]))
            asked = set(found.questions.get(served, ()))
            order = [number for number in work.order if number in asked] or work.order
            count = None if config.requests is None else max(1, round(config.requests * users[served] / everybody))
            work = replace(work, order=order, others=order, count=count)
            load = carry_out(target, config, work, self.folder / f"{name}.{expert}")
            return replace(load, observations=[replace(o, expert=expert, replica=name) for o in load.observations])

        with ThreadPoolExecutor(len(users)) as pool:
            return self._figures(merged(list(pool.map(one, users))))

    def _replica(self, name: str) -> tuple[Record, LoadTarget] | None:
        """A replica that can be asked without the router: one of ours."""
        record = RegistryReader(self.run.registry).snapshot().get(name)
        if record is None or record.kind is not RecordKind.EXPERT or record.nonce is None:
            return None
        return record, LoadTarget(record.url, replica_key(self.run.secret(), record.nonce))

    def _simulated(self) -> dict[str, tuple[float, float]]:
        """Of each replica with a simulated model: seconds of its steps, and seconds by which it fell behind."""
        found = {}
        for name, record in RegistryReader(self.run.registry).snapshot().items():
            if record.kind is RecordKind.EXPERT and record.engine.kind == "sim" and record.state is State.READY:
                at = self._replica(name)
                text = _metrics(at[1]) if at is not None else ""
                if STEPS in text:
                    found[name] = (_value(text, STEPS), _value(text, LOST))
        return found


def _metrics(target: LoadTarget) -> str:
    try:
        return str(call_blocking("GET", f"{target.url}{METRICS}", token=target.token).body)
    except Unreachable:
        return ""


def _value(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.split("\n") if line.startswith(name))


def _late(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> float | None:
    """Of the engine that lagged most."""
    shares = []
    for name, (steps_s, lost_s) in after.items():
        earlier = before.get(name, (0.0, 0.0))
        if steps_s > earlier[0]:
            shares.append((lost_s - earlier[1]) / (steps_s - earlier[0]))
    return max(shares, default=None) if after else None


def _halves(load: LoadResult) -> tuple[int, int]:
    middle = (load.window.start_s + load.window.end_s) / 2
    ended = [o.ended_s for o in load.observations if o.error is None and load.window.holds(o.ended_s)]
    return sum(at <= middle for at in ended), sum(at > middle for at in ended)


def slowdown_of(options: Sequence[Mapping[str, object]]) -> float:
    """Of the experts' engine options. Raises LaunchError where they differ: their figures could not be put together."""
    found = set()
    for each in options:
        roofline = each.get("roofline")
        found.add(float(str(roofline.get("slowdown") or 1.0)) if isinstance(roofline, Mapping) else 1.0)
    if len(found) > 1:
        raise LaunchError(f"experts are simulated with different slowdowns ({', '.join(map(str, sorted(found)))})")
    return found.pop() if found else 1.0
