"""One deployment of a sweep: bring it up, measure the points that are not there yet, take it down.

A point is kept the moment it is finished. A deployment that a killed call left is taken down first, so each is measured
fresh; one with nothing left to measure is not brought up at all.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.load.generator import LoadTarget
from hpc_router.bench.load.load_jobs import crew
from hpc_router.bench.point import Bench, MeasuredPoint, slowdown_of
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.record import Provenance, raw_lines, record
from hpc_router.bench.store import Store
from hpc_router.bench.workload import Point, points_of
from hpc_router.cluster.commands.down import down
from hpc_router.cluster.commands.router_access import router_access
from hpc_router.cluster.commands.up import Interrupted, Reporter, up
from hpc_router.cluster.planning.run_target import RunTarget
from hpc_router.cluster.signals import sigterm_as_interrupt
from hpc_router.config.schema import Deployment
from hpc_router.errors import LaunchError
from hpc_router.state.run_directory import RunDir

Around = Callable[[Point, int], Any]
"""A context in which a point is measured: the point, and how many are done."""


@dataclass(frozen=True, slots=True)
class DeploymentSweep:
    """What is measured on one deployment."""

    store: Store
    deployment: Deployment
    config: BenchConfig
    prompts: Sequence[BenchPrompt]

    def points(self) -> list[tuple[str, Point]]:
        return [(self.store.key(self.deployment, self.config, p), p) for p in points_of(self.config)]

    def missing(self) -> list[tuple[str, Point]]:
        return [(key, point) for key, point in self.points() if not self.store.has(key, valid=self.config.retry)]


def measure(
    leg: DeploymentSweep, *, reporter: Reporter, around: Around, origin: Callable[[RunDir], Provenance]
) -> list[MeasuredPoint]:
    """The points that were measured now. Raises ConfigError, LaunchError, KeyboardInterrupt."""
    if not leg.missing():
        return []
    with leg.store.claim(leg.deployment), sigterm_as_interrupt():
        run = leg.store.run_of(leg.deployment)
        _remove(leg, run)
        try:
            _up(leg, run, reporter)
            return _points(leg, run, around, origin(run))
        finally:
            _remove(leg, run)


def _up(leg: DeploymentSweep, run: RunDir, reporter: Reporter) -> None:
    try:
        served = up(RunTarget(leg.deployment, run.path), wait_all=True, reporter=reporter)
    except Interrupted as error:
        raise KeyboardInterrupt from error
    if served.failed:
        names = ", ".join(f"{view.replica} ({view.reason})" for view in served.failed)
        raise LaunchError(f"not measured, as {names} did not come up; its logs: {run.logs}")


def _remove(leg: DeploymentSweep, run: RunDir) -> None:
    if run.registry.is_dir():
        down(run)
    leg.store.clear(leg.deployment)


def _points(leg: DeploymentSweep, run: RunDir, around: Around, origin: Provenance) -> list[MeasuredPoint]:
    access = router_access(run)
    done, todo = len(leg.points()) - len(leg.missing()), leg.missing()
    measured = []
    with (
        tempfile.TemporaryDirectory(prefix="hpc-router-bench-") as scratch,
        crew(leg.config, shared=run.path / "load") as makers,
    ):
        target, slowdown = LoadTarget(access.url, access.token), slowdown_of(sim_options(asdict(leg.deployment)))
        bench = Bench(run, target, leg.config, leg.prompts, makers, Path(scratch), slowdown)
        for key, point in todo:
            with around(point, done):
                found = bench.measure(point)
            kept = record(key, found, config=leg.config, origin=origin)
            leg.store.add(key, kept, raw_lines(key, found) if leg.config.raw else None)
            measured.append(found)
            done += 1
    return measured


def sim_options(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    engines = [expert["engine"] for expert in config["experts"].values()]
    return [engine["options"] for engine in engines if engine["kind"] == "sim"]
