"""Measures the CPU time of one pass of the control loop, on a temporary run directory. Submits no job.

The run directory looks like that of a busy deployment: every replica is ready and renews its record between the passes,
all old generations have ended, and a recent copy of Slurm's queue lists the jobs. Before each pass, the progress file
of one job is written again, so that the pass has to read it.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig
from hpc_router.errors import ConfigError
from hpc_router.state import registry
from hpc_router.state.atomic_files import replace_json
from hpc_router.state.job_reader import SETTLED_S
from hpc_router.state.job_records import Exit, FailureReason, JobDir, JobInfo, JobPhase, JobProgress, Process, Runner
from hpc_router.state.registry import Record, RecordKind, State, replica_name
from hpc_router.state.run_directory import RunDir, make_run

EXPERTS: Final = 5
BEAT_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class PassCost:
    """The measured cost: milliseconds of CPU time per pass."""

    replicas: int
    generations: int
    passes: int
    median_ms: float
    p90_ms: float

    def line(self) -> str:
        what = f"{self.replicas} replicas with {self.generations} ended generations each, {self.passes} passes"
        return f"{what}: {self.median_ms:.1f} ms of CPU per pass (median), {self.p90_ms:.1f} ms (p90)"


def measure_passes(*, replicas: int, generations: int, passes: int, folder: Path | None = None) -> PassCost:
    """Creates a run directory, measures `passes` passes of the control loop on it, and removes it. `generations`:
    number of ended jobs per slot. `folder`: the run directory's parent (default: the system's temporary folder)."""
    if not (replicas and passes):
        raise ConfigError("bench passes: at least one replica and one pass are needed")
    with TemporaryDirectory(dir=folder) as path:
        run = make_run(Path(path) / "run")
        deployment = _deployment(replicas)
        records = _write_run(run, deployment, generations)
        control, router = ControlLoop(run, deployment=deployment), records[0].replica
        control.publish(control.run_pass())
        time.sleep(SETTLED_S)
        control.publish(control.run_pass())
        spent = []
        for number in range(passes):
            _renew(run, records, number)
            began = time.process_time()
            if control.leads(router):
                control.publish(control.run_pass())
            spent.append((time.process_time() - began) * 1000)
    ordered = sorted(spent)
    return PassCost(replicas, generations, passes, statistics.median(spent), ordered[int(0.9 * (len(ordered) - 1))])


def _deployment(replicas: int) -> Deployment:
    counts = {f"expert{n}": len(range(n, replicas, EXPERTS)) for n in range(min(EXPERTS, replicas))}
    engine = EngineConfig(kind="sim")
    deployment = Deployment(experts={n: ExpertConfig(model="m", engine=engine, replicas=c) for n, c in counts.items()})
    deployment.cluster = replace(deployment.cluster, kind="slurm", ask_s=BEAT_S)
    return deployment


def _write_run(run: RunDir, deployment: Deployment, generations: int) -> list[Record]:
    now, records = time.time(), list[Record]()
    queued: dict[str, dict[str, Any]] = {}
    run.write_desired({"router": True})
    slots = [(ROUTER, 0), *((name, n) for name, expert in deployment.experts.items() for n in range(expert.replicas))]
    for expert, slot in slots:
        for generation in range(1, generations + 2):
            replica, job_id = replica_name(expert, slot, generation), str(len(queued) + 1)
            newest = generation > generations
            _write_job(JobDir(run, replica), job_id, now - (generations + 1 - generation) * 1000, ended=not newest)
            state = "RUNNING" if newest else "COMPLETED"
            queued[job_id] = {"state": state, "node": f"n{slot}", "ends_at": now + 86400, "folder": str(run.path)}
        kind = RecordKind.ROUTER if expert == ROUTER else RecordKind.EXPERT
        url, serves = f"http://127.0.0.1:{1 + slot}", {expert: "m"}
        record = Record(kind, replica, url, State.READY, serves, generation, nonce="n", beat=1, beat_s=BEAT_S)
        registry.publish(run.registry, record)
        records.append(record)
    replace_json(run.squeue_json, {"asked_at": now, "jobs": queued})
    return records


def _write_job(job: JobDir, job_id: str, at: float, *, ended: bool) -> None:
    job.claim()
    job.write(JobInfo(job_id, "login", submitted_at=at, runner=Runner.SLURM))
    job.write(Process(1, 1, "node", "0", started_at=at + 5))
    job.write(JobProgress(JobPhase.DRAINING if ended else JobPhase.READY, at=at + 60, ready_at=at + 60))
    if ended:
        job.write(Exit(ok=True, reason=FailureReason.DRAINED, message="drained", at=at + 900))
        replace_json(job.path / "ended.json", {"at": at + 900, "message": None, "status": 0})


def _renew(run: RunDir, records: list[Record], number: int) -> None:
    for place, record in enumerate(records):
        records[place] = replace(record, beat=(record.beat or 0) + 1)
        registry.publish(run.registry, records[place])
    job = JobDir(run, records[number % len(records)].replica)
    progress = job.progress()
    if progress is not None:
        job.write(progress)
