"""One deployment of a sweep: starts the deployment, measures the missing points, and stops it.

Every point is stored when it is finished. If an earlier process was killed and left the deployment running, the
deployment is stopped first, so that each measurement starts fresh. A deployment without missing points is not started.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.point import MeasuredPoint, point_measurement
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.provenance import Provenance
from hpc_router.bench.record import raw_lines, record
from hpc_router.bench.search import next_rate
from hpc_router.bench.store import Store
from hpc_router.bench.workload import Point, points_of
from hpc_router.cluster.commands.down import down
from hpc_router.cluster.commands.up import Reporter, up
from hpc_router.cluster.planning.run_target import RunTarget
from hpc_router.cluster.signals import sigterm_as_interrupt
from hpc_router.config.schema import Deployment
from hpc_router.errors import LaunchError
from hpc_router.state.run_directory import RunDir

PointContext = Callable[[Point, int], AbstractContextManager[None]]
"""Returns a context manager for the measurement of a point, such as a progress bar. The number says how many points are
finished."""


@dataclass(frozen=True, slots=True)
class DeploymentSweep:
    """The points to measure on one deployment, and the store for their results."""

    store: Store
    deployment: Deployment
    config: BenchConfig
    prompts: Sequence[BenchPrompt]

    def points(self) -> list[tuple[str, Point]]:
        """Returns all points, each with its key in the store; in a search, the finished points and the next one."""
        if self.config.search is None:
            return [self._with_key(point) for point in points_of(self.config)]
        measured = self.measured_rates()
        rate = next_rate(measured, self.config)
        rates = [*measured, *([] if rate is None else [rate])]
        return [self._with_key(Point(rate_per_s=rate)) for rate in rates]

    def measured_rates(self) -> dict[float, bool]:
        """Returns the finished points of a search: rate -> whether its goodput target held."""
        measured: dict[float, bool] = {}
        while (rate := next_rate(measured, self.config)) is not None:
            record = self.store.read(self._with_key(Point(rate_per_s=rate))[0])
            if record is None:
                break
            measured[rate] = not record["exceeded"] and record["good_share"] >= self.config.search_share
        return measured

    def missing(self) -> list[tuple[str, Point]]:
        valid = self.config.retry and self.config.search is None
        return [(key, point) for key, point in self.points() if not self.store.has(key, valid=valid)]

    def _with_key(self, point: Point) -> tuple[str, Point]:
        return self.store.key(self.deployment, self.config, point), point


def measure_missing(
    sweep: DeploymentSweep, *, reporter: Reporter, context: PointContext, origin: Callable[[RunDir], Provenance]
) -> list[MeasuredPoint]:
    """Starts the deployment, measures the points that the store lacks, stores each, and returns their figures. Raises
    ConfigError, LaunchError and KeyboardInterrupt."""
    if not sweep.missing():
        return []
    with sweep.store.claim(sweep.deployment), sigterm_as_interrupt():
        run = sweep.store.run_of(sweep.deployment)
        _take_down(sweep, run)
        try:
            _bring_up(sweep, run, reporter)
            return _measure(sweep, run, context, origin(run))
        finally:
            _take_down(sweep, run)


def _bring_up(sweep: DeploymentSweep, run: RunDir, reporter: Reporter) -> None:
    result = up(RunTarget(sweep.deployment, run.path), wait_all=True, reporter=reporter)
    if result.failed:
        names = ", ".join(f"{view.replica} ({view.reason})" for view in result.failed)
        raise LaunchError(f"not measured, because replicas failed to start: {names}; logs: {run.logs}")


def _take_down(sweep: DeploymentSweep, run: RunDir) -> None:
    if run.registry.is_dir():
        down(run)
    sweep.store.clear(sweep.deployment)


def _measure(sweep: DeploymentSweep, run: RunDir, context: PointContext, origin: Provenance) -> list[MeasuredPoint]:
    config, missing = sweep.config, sweep.missing()
    done = len(sweep.points()) - len(missing)
    measured: list[MeasuredPoint] = []
    with point_measurement(
        run, config, sweep.prompts, deployment=asdict(sweep.deployment), shared=run.path / "load"
    ) as measurement:
        while missing:
            key, point = missing.pop(0)
            with context(point, done + len(measured)):
                found = measurement.measure(point)
            sweep.store.add(
                key, record(key, found, config=config, origin=origin), raw_lines(key, found) if config.raw else None
            )
            measured.append(found)
            if config.search is not None:
                missing = sweep.missing()
    return measured
