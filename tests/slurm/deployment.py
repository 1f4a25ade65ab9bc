"""A deployment on the test cluster, used through the command line on this machine, which reaches every node by its
address. Each query of the controller is recorded."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hpc_router.net.http_client import Unreachable, call_blocking
from hpc_router.state.job_records import JobDir
from hpc_router.state.registry import RegistryReader, leading_router
from hpc_router.state.run_directory import RunDir
from tests.e2e.deployment import Deployed
from tests.slurm.cluster import SlurmCluster
from tests.support.waiting import eventually_sync

ASKING: Final = ("squeue", "sacct", "scontrol", "sinfo", "sstat")
LEAKED: Final = {
    "SLURM_JOB_ID": "99999",
    "SLURM_CPU_BIND": "map_cpu:0",
    "SBATCH_PARTITION": "of-another-job",
    "SBATCH_REQUEUE": "1",
    "SRUN_CPUS_PER_TASK": "7",
    "SQUEUE_FORMAT": "%A",
    "SCANCEL_STATE": "COMPLETING",
    "SINFO_FORMAT": "%n",
}
"""Variables of another Slurm job in which `up` may run. Any that reaches a command breaks the tests."""
_NOTE: Final = """\
#!/bin/bash
printf '%s\\t{name}\\t%s\\n' "$(date +%s.%N)" "$(tr '\\0' ' ' </proc/$PPID/cmdline)" >>{log}
PATH=${{PATH//"{folder}:"/}} exec {name} "$@"
"""


@dataclass(frozen=True)
class SlurmQuery:
    """One call of a command that queries the controller. `by`: the caller's command line."""

    at: float
    command: str
    by: str

    @property
    def by_loop(self) -> bool:
        return "reconcile --loop" in self.by


@dataclass
class OnSlurm(Deployed):
    cluster: SlurmCluster = field(kw_only=True)

    def verb(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return super().verb(*arguments, env=self.environment, **options)

    @property
    def tools(self) -> Path:
        return self.run.parent / "tools"

    @property
    def environment(self) -> dict[str, str]:
        found = os.environ | self.cluster.environment | LEAKED
        return found | {"PATH": f"{self.tools}:{found['PATH']}"}

    def record_queries(self) -> None:
        self.tools.mkdir()
        for name in ASKING:
            tool = self.tools / name
            tool.write_text(_NOTE.format(name=name, folder=self.tools, log=self.run.parent / "queries"))
            tool.chmod(0o755)

    def slurm_queries(self) -> list[SlurmQuery]:
        log = self.run.parent / "queries"
        lines = log.read_text().splitlines() if log.exists() else []
        return [SlurmQuery(float(at), command, by) for at, command, by in (line.split("\t", 2) for line in lines)]

    def job(self, replica: str) -> JobDir:
        return JobDir(RunDir(self.run), replica)

    def job_id(self, replica: str) -> str:
        info = self.job(replica).info()
        assert info is not None
        return info.job_id

    def nodes_of(self, replica: str) -> str:
        """The job's nodes as Slurm lists them: n[1-2]."""
        return self.cluster.run(["squeue", "--noheader", "--format=%N", f"--jobs={self.job_id(replica)}"]).strip()

    def excluded_of(self, replica: str) -> str:
        """The nodes on which the job may not start, as Slurm lists them."""
        words = self.cluster.run(["scontrol", "--oneliner", "show", "job", self.job_id(replica)]).split()
        return next(word.partition("=")[2] for word in words if word.startswith("ExcNodeList="))

    def newest(self, slot: str) -> str:
        found = self.claimed(f"{slot}.g")
        return max(found, key=_generation)

    def serving(self, slot: str) -> str:
        """The newest replica that serves. A router's successor may wait behind it."""
        return next(r for r in sorted(self.claimed(f"{slot}.g"), key=_generation, reverse=True) if self.record(r))

    def record(self, replica: str) -> dict[str, Any] | None:
        """The replica's record in the registry; None if there is none that serves."""
        path = self.run / "registry" / f"{replica}.json"
        try:
            record: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        return record if record["state"] == "ready" else None

    def until_ready(self, slot: str, *, after: str, within_s: float = 90) -> str:
        """Waits until a generation of the slot after that one serves and the router has found it, and returns the first
        that does."""

        def serving() -> str | None:
            later = [r for r in self.claimed(f"{slot}.g") if _generation(r) > _generation(after)]
            return next((r for r in sorted(later, key=_generation) if self.record(r) is not None), None)

        try:
            replica = eventually_sync(serving, within_s=within_s, every_s=0.1)
            eventually_sync(lambda: self.record(replica) is None or self.is_found(replica), within_s=30, every_s=0.1)
            return replica
        except AssertionError as error:
            error.add_note(self.what_happened())
            raise

    def until_standby(self) -> str:
        """Waits until a standby of the router is in the queue, and returns it."""
        standby: str = eventually_sync(lambda: self.status()["router"]["standby"], within_s=60, every_s=1.0)
        return standby

    def is_found(self, *replicas: str) -> bool:
        """Whether the leading router has found these replicas and they are ready. Leaves out routers."""
        router = leading_router(RegistryReader(self.run / "registry").snapshot())
        try:
            answer = None if router is None else call_blocking("GET", f"{router.url}/status", token=self.token)
        except Unreachable:
            return False
        experts = {} if answer is None or answer.status != 200 else answer.body["experts"]
        ready = {r["replica"] for e in experts.values() for r in e["replicas"] if r["state"] == "ready"}
        return ready >= {name for name in replicas if not name.startswith("router-")}

    def what_happened(self) -> str:
        """What Slurm and the run directory say at this moment, for the report of a failed test."""
        commands = (
            ["squeue", "--states=all"],
            ["sinfo", "--Node", "--long"],
            ["scontrol", "--details", "show", "node"],
            ["scontrol", "--details", "show", "job"],
        )
        said = [f"$ {' '.join(command)}\n{self.cluster.run(command)}" for command in commands]
        for path in (
            self.run / "events.jsonl",
            *sorted((self.run / "logs").iterdir()),
            *sorted(self.run.glob("jobs/*/*")),
        ):
            said.append(
                "\n".join([f"{path.relative_to(self.run)}:", *path.read_text(errors="replace").splitlines()[-30:]])
            )
        return "\n".join(said)

    def start_to_ready_s(self, replica: str) -> float:
        """Seconds from the start of its job, according to Slurm, until it was first ready."""
        job = self.job(replica)
        ready_at = eventually_sync(lambda: p.ready_at if (p := job.progress()) is not None else None)
        words = self.cluster.run(["scontrol", "--oneliner", "show", "job", self.job_id(replica)]).split()
        start = next(word.partition("=")[2] for word in words if word.startswith("StartTime="))
        started_at = float(self.cluster.run(["date", "--date", start, "+%s"]))
        return ready_at - started_at

    def claimed(self, prefix: str = "") -> list[str]:
        """All replicas that were ever claimed."""
        return sorted(f.name for f in (self.run / "jobs").iterdir() if f.name.startswith(prefix))

    def queued(self, prefix: str = "") -> list[str]:
        """Ids of this run's jobs that Slurm still has."""
        ids = {info.job_id for replica in self.claimed(prefix) if (info := self.job(replica).info())}
        listed = self.cluster.run(["squeue", "--noheader", "--format=%i"]).split()
        return sorted(ids & set(listed))

    def nothing_left(self) -> None:
        eventually_sync(lambda: not self.queued(), within_s=30, every_s=0.5)  # Slurm cleans up after a job
        eventually_sync(lambda: not any((self.run / "registry").iterdir()))  # a file system may show this late
        super().nothing_left()


def _generation(replica: str) -> int:
    return int(replica.rpartition(".g")[2])


@contextmanager
def on_slurm(
    cluster: SlurmCluster, name: str, *overrides: str, wait_all: bool = True, shared: Path | None = None
) -> Iterator[OnSlurm]:
    """Up, then down whatever happened; afterwards nothing is left. `shared`: in which folder, other than the cluster's
    own."""
    folder = (shared or cluster.shared) / name
    folder.mkdir()
    scratch = folder / "none"  # each node has its own /tmp, which ends with the node
    scratch.mkdir()
    one = OnSlurm(folder / "run", scratch, ["cluster=slurm", *overrides], cluster=cluster)
    one.record_queries()
    with one.running(wait_all=wait_all):
        yield one
