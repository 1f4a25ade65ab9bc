"""Walltime ends and incidents under load on the test cluster, as one command that prints a table.

    python -m tests.slurm.handover_report     # 100 streams of 10 s and 50 requests per second, a quarter of an hour
    python -m tests.slurm.handover_report --part walltime --walltime 10

Half of the load uses `hpc_router.client`, half goes through `hpc-router connect`. Needs root, Slurm and the freezer of
cgroup v1. Exits with 1 if a request failed, or a stream that was not on a replica that died, or a successor came late.
"""

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.continuity import Service, events, under_load
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.slurm.disk import mounted_disk
from tests.slurm.incidents import Incident, Outcome, incidents, submitted_once
from tests.support.waiting import eventually

TOKENS: Final = 50
ITL_MS: Final = 200
GRACE_S: Final = 40
"""Of a preempted job: longer than its drain."""
SLOTS: Final = ("math-0", "law-0", "law-1", "router-0")
OVERRIDES: Final = (
    "topology=sim",
    "policy.fallback=null",
    *(f"experts.{name}.replicas=0" for name in ("medicine", "generalist", "code")),
    *(f"experts.{name}.engine.options={{ttft_ms: 50, itl_ms: {ITL_MS}, load_s: 5}}" for name in ("math", "law")),
    *(f"experts.{name}.resources.gpus=1" for name in ("math", "law")),
    "experts.law.replicas=2",
    "router.resources.sbatch={nodelist: c1}",
    "cluster.drain_s=30",
    "router.drain_s=30",
    "cluster.warn_s=30",
    "cluster.handover_margin_s=10",
)
HEAD: Final = (
    "| event | failed requests | broken streams (on dead replicas) | longest without an answer | submitted after |",
    "|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Row:
    name: str
    failed: int
    broken: int
    excused: int
    without_answer_s: float
    submitted_s: float | None = None
    within_s: float | None = None

    @property
    def bad(self) -> bool:
        late = self.submitted_s is not None and self.within_s is not None and self.submitted_s > self.within_s
        return late or self.failed > 0 or self.broken > self.excused

    def __str__(self) -> str:
        submitted = "" if self.submitted_s is None else f"{self.submitted_s:.1f} s"
        broken = f"{self.broken} ({self.excused})"
        return f"| {self.name} | {self.failed} | {broken} | {self.without_answer_s:.1f} s | {submitted} |"


def row(service: Service, name: str, *, since: float, until: float, outcome: Outcome | None = None) -> Row:
    hit = frozenset() if outcome is None else outcome.hit
    last = math.inf if until == service.ended_at else until  # requests in flight at the load's end count too
    broken = service.failures("stream", since=since, until=last)
    return Row(
        name,
        len(service.failures("request", since=since, until=last)),
        len(broken),
        sum(failure.replica in hit for failure in broken),
        service.without_answer_s(since=since, until=until),
        None if outcome is None else outcome.submitted_s,
    )


def handover_rows(service: Service) -> Iterator[Row]:
    """From each start of a handover to the end of the old job; then everything."""
    deployed, offset = service.deployed, time.time() - time.monotonic()
    started = {event["replica"]: event["at"] - offset for event in events(deployed, "handover_started")}
    for slot in SLOTS:
        for n in (1, 2):
            end = deployed.job(f"{slot}.g{n}").exit()
            since = started[f"{slot}.g{n + 1}"]
            until = service.ended_at if end is None else end.at - offset
            yield row(service, f"walltime end of {slot}.g{n}", since=since, until=until)
    yield row(service, "all of it", since=service.began_at, until=service.ended_at)


async def walltime_ends(deployed: OnSlurm, load: "LoadSize") -> list[Row]:
    async with under_load(deployed, "math", "law", streams=load.streams, per_s=load.per_s, stream_tokens=TOKENS) as one:
        for slot in SLOTS:
            for n in (1, 2):
                await eventually(deployed.job(f"{slot}.g{n}").exit, within_s=3600)
    rows = list(handover_rows(one))
    print(f"{one.done('request')} requests, {one.done('stream')} streams; slower than 10 s: {one.slow_requests()}")
    print(f"hpc_router_unready_seconds_total: math {one.unready('math'):.1f}, law {one.unready('law'):.1f}")
    ends = [record["expires_at"] for n in (0, 1) if (record := deployed.record(deployed.serving(f"law-{n}")))]
    print(f"the ends of the two replicas of law, which started together, are {abs(ends[0] - ends[1]):.0f} s apart")
    return rows


async def incident(deployed: OnSlurm, load: "LoadSize", one: Incident) -> Row:
    before = deployed.claimed()
    async with under_load(deployed, "law", streams=load.streams, per_s=load.per_s, stream_tokens=TOKENS) as service:
        await asyncio.sleep(TOKENS * ITL_MS / 1000)
        outcome = await one.cause(service)
    assert submitted_once(deployed, before), deployed.claimed()
    found = row(service, one.name, since=service.began_at, until=service.ended_at, outcome=outcome)
    return replace(found, within_s=one.within_s)


@dataclass(frozen=True)
class LoadSize:
    streams: int
    per_s: float


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm.handover_report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--part", choices=("walltime", "incidents"), help="only one half")
    parser.add_argument("--walltime", default="4", help="of the jobs whose walltime ends (%(default)s minutes)")
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--per-s", type=float, default=50.0, help="short requests per second")
    chosen = parser.parse_args()
    if lack := lacking("cgroup"):
        print(f"needs {lack}", file=sys.stderr)
        return 1
    load, rows = LoadSize(chosen.streams, chosen.per_s), list[Row]()

    def show(*found: Row) -> None:
        print("\n".join([*(() if rows else HEAD), *map(str, found)]), flush=True)
        rows.extend(found)

    with mounted_disk() as disk, SlurmCluster(proctrack="cgroup") as cluster:
        deploy = partial(on_slurm, cluster, shared=disk)
        if chosen.part in (None, "walltime"):
            with deploy("walltime", *OVERRIDES, f"cluster.walltime={chosen.walltime}", "cluster.ask_s=10") as deployed:
                show(*asyncio.run(walltime_ends(deployed, load)))
        if chosen.part in (None, "incidents"):
            cluster.run(["scontrol", "update", "PartitionName=batch", f"GraceTime={GRACE_S}"])
            with deploy("incidents", *OVERRIDES, "cluster.walltime=120") as deployed:
                for one in incidents(away_s=120, stalled_s=60):
                    show(asyncio.run(incident(deployed, load, one)))
    return int(any(one.bad for one in rows))


if __name__ == "__main__":
    sys.exit(main())
