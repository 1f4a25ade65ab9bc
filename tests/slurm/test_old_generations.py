"""Retention on a real Slurm: files of generations that ended long ago go, and those of live jobs stay."""

import json

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

OVERRIDES = (
    "topology=sim",
    "policy=round_robin",
    "experts={math: {model: m, engine: {kind: sim}}}",
    "policy.fallback=null",
    "cluster.max_failures=1",
    "cluster.keep_generations=2",
)
LONG_AGO_S = 7200.0
MATH = tuple(f"math-0.g{n}" for n in range(1, 6))


def age(one: OnSlurm, replica: str) -> None:
    """Lets it have ended LONG_AGO_S earlier."""
    path = one.job(replica).path / "exit.json"
    end = json.loads(path.read_text())
    path.write_text(json.dumps({**end, "at": end["at"] - LONG_AGO_S}))


def files_of(one: OnSlurm, replica: str) -> list[str]:
    folders = [one.run / "jobs" / replica, *(one.run / "logs").glob(f"{replica}.*")]
    return [path.name for path in folders if path.exists()]


def test_old_generations_go_and_live_ones_stay(cluster: SlurmCluster) -> None:
    """The loop of a new router reads the records anew."""
    with on_slurm(cluster, "old", *OVERRIDES) as one:
        for replica in MATH[:-1]:
            one.verb("drain", "math-0")
            one.until_ready("math-0", after=replica)
        for replica in MATH[:-1]:
            eventually_sync(one.job(replica).exit, within_s=30)
            age(one, replica)
        one.until_standby()
        one.verb("drain", "router")
        one.until_ready("router-0", after="router-0.g1")
        eventually_sync(lambda: not files_of(one, MATH[0]) and not files_of(one, MATH[1]), within_s=60)
        assert all(files_of(one, replica) for replica in (*MATH[2:], "router-0.g1"))
        eventually_sync(lambda: one.ready("math") == [MATH[-1]], every_s=0.5)  # the new router has found it
        one.verb("drain", "math-0")
        assert one.until_ready("math-0", after=MATH[-1]) == "math-0.g6"
