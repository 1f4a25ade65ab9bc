"""What happens to a deployment that serves. Each function causes one incident to a replica of the expert `law`, and
returns once the service is whole again."""

import asyncio
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from tests.slurm.configuration import SLURMD_TIMEOUT_S
from tests.slurm.continuity import Service
from tests.slurm.deployment import OnSlurm
from tests.support.waiting import eventually

SLOT: Final = "law-0"


@dataclass(frozen=True)
class Outcome:
    """`hit`: the replicas whose streams may break. `submitted_s`: from the end of the replica until its successor was
    submitted."""

    hit: frozenset[str] = frozenset()
    submitted_s: float | None = None


@dataclass(frozen=True)
class Incident:
    """`within_s`: limit of `Outcome.submitted_s`."""

    name: str
    cause: Callable[[Service], Awaitable[Outcome]] = field(repr=False)
    within_s: float | None = None


async def preempted(service: Service) -> Outcome:
    """A job of higher priority takes its whole node. Under proctrack/linuxproc, Slurm's SIGTERM ends the engine too."""
    deployed, replica = service.deployed, service.deployed.serving(SLOT)
    node = deployed.nodes_of(replica)
    urgent = ["sbatch", "--parsable", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--wrap=sleep 600"]
    job_id = deployed.cluster.run(urgent).strip()
    try:
        await _replaced(deployed, replica)
    finally:
        deployed.cluster.run(["scancel", job_id])
    return Outcome(frozenset({replica} if deployed.cluster.proctrack == "linuxproc" else ()))


async def cancelled(service: Service) -> Outcome:
    """Slurm kills it after KillWait."""
    deployed, replica = service.deployed, service.deployed.serving(SLOT)
    deployed.cluster.run(["scancel", deployed.job_id(replica)])
    successor = await _replaced(deployed, replica)
    end = deployed.job(replica).exit()
    assert end is not None
    return Outcome(frozenset({replica}), _submitted_at(deployed, successor) - end.at)


async def agent_killed(service: Service) -> Outcome:
    deployed, replica = service.deployed, service.deployed.serving(SLOT)
    process = deployed.job(replica).process()
    assert process is not None
    killed_at = time.time()
    deployed.cluster.node(process.host).enter(["kill", f"-{signal.SIGKILL.value}", str(process.pid)])
    successor = await _replaced(deployed, replica)
    return Outcome(frozenset({replica}), _submitted_at(deployed, successor) - killed_at)


async def node_off(service: Service) -> Outcome:
    """Its node comes back once all that ran there has been replaced."""
    deployed, cluster = service.deployed, service.deployed.cluster
    node = deployed.nodes_of(deployed.serving(SLOT))
    slots = {replica.partition(".")[0] for replica in deployed.claimed() if not replica.startswith("router")}
    there = [replica for slot in slots if deployed.nodes_of(replica := deployed.serving(slot)) == node]
    killed_at = time.time()
    await asyncio.to_thread(cluster.node(node).kill)
    try:
        successors = [await _replaced(deployed, replica) for replica in there]
    finally:
        cluster.node(node).restart()
    await eventually(partial(_has_all_nodes, deployed), within_s=6 * SLURMD_TIMEOUT_S)
    return Outcome(frozenset(there), max(_submitted_at(deployed, s) for s in successors) - killed_at)


async def controller_away(away_s: float, service: Service) -> Outcome:
    """An agent dies while slurmctld is away. Its successor is submitted once, after that."""
    deployed, cluster = service.deployed, service.deployed.cluster
    replica = deployed.serving(SLOT)
    process = deployed.job(replica).process()
    assert process is not None
    pid = (cluster.folder / "run" / "slurmctld.pid").read_text().strip()
    cluster.controller.enter(["kill", pid])
    try:
        await asyncio.sleep(away_s / 2)
        cluster.node(process.host).enter(["kill", f"-{signal.SIGKILL.value}", str(process.pid)])
        await asyncio.sleep(away_s / 2)
    finally:
        cluster.controller.daemon(["slurmctld", "-D"])
    await _replaced(deployed, replica)
    return Outcome(frozenset({replica}))


async def folder_stalled(stalled_s: float, service: Service) -> Outcome:
    """Every write to the run directory's file system waits until it is thawed."""
    deployed = service.deployed
    before = deployed.claimed()
    mounted = next(path for path in deployed.run.parents if path.is_mount())
    _fsfreeze("--freeze", mounted)
    try:
        await asyncio.sleep(stalled_s)
    finally:
        _fsfreeze("--unfreeze", mounted)
    await eventually(partial(_beats_again, deployed))
    assert deployed.claimed() == before, "nothing was submitted"
    return Outcome()


def _fsfreeze(verb: str, mounted: Path) -> None:
    subprocess.run(["fsfreeze", verb, str(mounted)], check=True)


def submitted_once(deployed: OnSlurm, before: Collection[str]) -> bool:
    """Whether of no slot two jobs were submitted since these replicas were all."""
    new = [
        replica for replica in deployed.claimed() if replica not in before and deployed.job(replica).info() is not None
    ]
    slots = [replica.partition(".")[0] for replica in new]
    return len(slots) == len(set(slots))


async def _replaced(deployed: OnSlurm, replica: str) -> str:
    """The ready successor."""
    slot = replica.partition(".")[0]

    def ready() -> str | None:
        newest = deployed.newest(slot)
        return newest if newest != replica and deployed.record(newest) is not None else None

    successor: str = await eventually(ready, within_s=150)
    return successor


def _submitted_at(deployed: OnSlurm, replica: str) -> float:
    info = deployed.job(replica).info()
    assert info is not None
    return info.submitted_at


async def _has_all_nodes(deployed: OnSlurm) -> bool:
    states = await asyncio.to_thread(deployed.cluster.states)
    return set(states.values()) <= {"idle", "mixed"}


def _beats_again(deployed: OnSlurm) -> bool:
    """Whether a record was renewed in the last second."""
    ages = [time.time() - path.stat().st_mtime for path in (deployed.run / "registry").glob("*.json")]
    return min(ages) < 1


def incidents(*, away_s: float, stalled_s: float) -> tuple[Incident, ...]:
    return (
        Incident("preemption", preempted),
        Incident("cancel", cancelled, within_s=5),
        Incident("kill -9 of an agent", agent_killed, within_s=5),
        Incident("node off", node_off, within_s=12),
        Incident(f"slurmctld away {away_s:.0f} s", partial(controller_away, away_s)),
        Incident(f"run directory stalled {stalled_s:.0f} s", partial(folder_stalled, stalled_s)),
    )
