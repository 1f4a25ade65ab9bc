"""A Slurm with agents, both simulated, below the real launcher, observer and control loop.

Time is a number that only `step` advances. The controller is reached where the product starts Slurm's commands; agents
write the same files as real ones. Nothing here decides at random: a storm calls `lose_node`, `preempt` and the like.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any, Final

from hpc_router.cluster.launchers.commands import SlurmCommandError
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.launchers.submitit import process
from hpc_router.cluster.launchers.submitit.submission import Submission
from hpc_router.state import registry
from hpc_router.state.job_records import (
    Ended,
    Exit,
    FailureReason,
    JobDir,
    JobPhase,
    JobProgress,
    Process,
    start_ticks,
)
from hpc_router.state.registry import Record, RecordKind, State, split_replica
from hpc_router.state.run_directory import RunDir

BEGAN: Final = 2_000_000_000.0
"""Later than any file's real time, by which `stamp_folders` knows which ones were written since its last call."""
MIN_JOB_AGE_S: Final = 300.0
KILL_WAIT_S: Final = 30.0
DETECT_S: Final = 40.0
"""From the loss of a node until the controller knows of it."""
BEAT_S: Final = 15.0


class HostDied(Exception):
    """The host on which a control loop runs is gone."""


@dataclass
class Agent:
    """One service of a job. `ends_at`: when its drain is over; `hung`: it neither beats, answers nor obeys TERM.
    `unknown`: it was killed with all that could report its end, so Slurm says that it runs."""

    replica: str
    step: str
    phase: str = "waiting"  # loading, ready, draining, ended
    ready_at: float | None = None
    ends_at: float | None = None
    hung: bool = False
    unknown: bool = False
    asked: bool = False
    beat: int = 0
    beat_at: float = 0.0

    @property
    def is_router(self) -> bool:
        return split_replica(self.replica)[0] == ROUTER


@dataclass
class FakeJob:
    """`state` is Slurm's. `kill_at`: SIGKILL after a grace time. `final`: the state in which it will end."""

    job_id: str
    name: str
    agents: list[Agent]
    after: str | None
    limit_s: float
    submitted_at: float
    load_s: float
    drain_s: float
    state: str = "PENDING"
    node: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    warned: bool = False
    kill_at: float | None = None
    final: str = "COMPLETED"

    @property
    def over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING")

    @property
    def cancelled(self) -> bool:
        """Whether scancel without a signal was run. Slurm then says so even if the node turns out to be lost."""
        return self.final == "CANCELLED"

    @property
    def ends_at(self) -> float | None:
        return None if self.started_at is None else self.started_at + self.limit_s


@dataclass
class FakeSlurm:
    """`load_s`, `drain_s`, `queue_s`: drawn for each job. `limit_s`: walltime. `nodes`: free GPUs of each node."""

    run: RunDir
    nodes: dict[str, int]
    limit_s: float
    warn_s: float
    draw: Callable[[str], float]
    now: float = BEGAN
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)  # node: since when
    away_until: float = 0.0  # the controller answers nothing
    lag_s: float = 0.0  # time that an answer of the controller takes
    stalled_until: float = 0.0  # agents cannot write
    failures: list[str] = field(default_factory=list)  # of the next submissions: refused, unanswered, lost, orphan
    meanwhile: Callable[[float], None] = lambda seconds: None  # what happens while a command waits
    log: Callable[[str], None] = lambda text: None
    asked_to_end: Callable[[FakeJob, Agent], None] = lambda job, agent: None  # by the product, before the job learns it
    submissions: list[str] = field(default_factory=list)
    answered_at: float = BEGAN
    release_at: dict[str, float] = field(default_factory=dict)

    def time(self) -> float:
        return self.now

    # The side of the product: where it starts commands and calls agents.

    def command(self, argv: Sequence[str], *, timeout_s: float, **_: object) -> str:
        if self.now < self.away_until:
            self.meanwhile(min(timeout_s, self.away_until - self.now))
            raise SlurmCommandError(f"{argv[0]} gave no answer within {timeout_s:g} s")
        self.answered_at = self.now
        answer = getattr(self, f"_{argv[0]}")(argv[1:])
        if self.lag_s:
            self.meanwhile(self.lag_s)  # the answer is that of the time of the question
        return str(answer)

    def _squeue(self, words: Sequence[str]) -> str:
        if "--steps" in words:
            return ""
        form = next(word for word in words if word.startswith("--format=")).removeprefix("--format=")
        kept = [job for job in self.jobs.values() if not job.over or self.now < (job.ended_at or 0.0) + MIN_JOB_AGE_S]
        lines = [self._line(job, form) for job in kept]
        return "\n".join([*lines, *lines[:1]])  # one line twice

    def _sinfo(self, _words: Sequence[str]) -> str:
        return f"gpu|gpu*|up|infinite|{len(self.nodes)}|8|1000|idle|(null)|gpu:2"

    def _line(self, job: FakeJob, form: str) -> str:
        def text(at: float | None) -> str:
            return "N/A" if at is None else datetime.fromtimestamp(at).isoformat(timespec="seconds")

        waits = job.after is not None and not self._may_start(job)
        values = {
            "%i": job.job_id,
            "%T": "COMPLETING" if job.state == "RUNNING" and job.cancelled else job.state,
            "%N": job.node or "",
            "%S": text(job.started_at),
            "%e": text(job.ended_at if job.over else job.ends_at),
            "%j": job.name,
            "%Z": str(self.run.path),
            "%P": "gpu",
            "%r": "Dependency" if waits else "Resources" if job.state == "PENDING" else "None",
        }
        return "\t".join(values[key] for key in form.split("\t"))

    def _scancel(self, words: Sequence[str]) -> str:
        options = [word for word in words if word.startswith("--")]
        for name in (word for word in words if not word.startswith("--")):
            job_id, _, step = name.partition(".")
            job = self.jobs.get(job_id)
            if job is None or job.over:
                continue
            if "--state=PENDING" in options and job.state != "PENDING":
                continue
            self._signal(job, step, options)
        return ""

    def _signal(self, job: FakeJob, step: str, options: Sequence[str]) -> None:
        agents = [agent for agent in job.agents if step in ("", agent.step)]
        if job.state == "PENDING":
            if "--signal=TERM" not in options and "--signal=KILL" not in options:
                self.end(job, "CANCELLED")
            return
        for agent in agents:
            self.asked_to_end(job, agent)
        if "--signal=KILL" in options:
            self.kill(job, agents)
        elif "--signal=TERM" in options:
            self.terminate(job, agents)
        else:
            self.cancel(job)

    def cancel(self, job: FakeJob) -> None:
        if job.state == "PENDING":
            self.end(job, "CANCELLED")
            return
        job.final = "CANCELLED"
        self.terminate(job, job.agents)
        job.kill_at = min(job.kill_at or self.now + KILL_WAIT_S, self.now + KILL_WAIT_S)

    def _scontrol(self, words: Sequence[str]) -> str:
        values = dict(word.partition("=")[::2] for word in words[1:])
        job = self.jobs[values["JobId"]]
        if job.state != "PENDING":
            raise SlurmCommandError("Job is no longer pending execution", output="")
        if "Dependency" in values:
            job.after = None
        return ""

    def submit_all(self, submissions: Sequence[Submission]) -> dict[str, str | None]:
        results: dict[str, str | None] = {}
        for submission in submissions:
            self._write_submitter(submission, start_ticks(os.getpid()) or 0)
        try:
            for submission in submissions:
                results |= dict.fromkeys(submission.argv_of, self._submit(submission))
        except HostDied:
            for submission in submissions:
                self._write_submitter(submission, 0)  # of a process that is gone
            raise
        return results

    def _submit(self, submission: Submission) -> str | None:
        failure = self.failures.pop(0) if self.failures else None
        self.stamp_folders()
        if self.now < self.away_until:
            self.meanwhile(20.0)
            failure = failure or "unanswered"
        elif self.lag_s:
            self.meanwhile(self.lag_s)
        if failure is not None:
            self.log(f"submission of {', '.join(submission.argv_of)}: {failure}")
        if failure in ("host-dies", "host-dies-after-sbatch"):
            if failure == "host-dies-after-sbatch":
                self._add(submission)
            raise HostDied
        if failure == "lost":  # the host of the submitter dies before sbatch
            return "the submitting process failed: killed"
        if failure == "orphan":  # it dies after sbatch
            self._add(submission)
            return "the submitting process failed: killed"
        return (
            process.submit(replace(submission, gpus=())).error if failure is None else self._refuse(submission, failure)
        )

    def _write_submitter(self, submission: Submission, ticks: int) -> None:
        process.write_submitter(submission, ticks)
        for job in submission.jobs:
            os.utime(job.path / "submitter.json", (self.now, self.now))

    def _refuse(self, submission: Submission, failure: str) -> str:
        if failure == "unanswered-but-submitted":
            self._add(submission)
        if failure.startswith("unanswered"):
            return "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
        return "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy"

    def executor(self, submission: Submission) -> Any:
        """In place of submitit's: the product's own code around it runs."""

        def submit(*_: object) -> SimpleNamespace:
            if any(split_replica(name)[0] != ROUTER for name in submission.argv_of) and self.overlap_refused(
                submission
            ):
                raise CalledProcessError(1, "sbatch", stderr=self._refuse(submission, "refused"))
            return SimpleNamespace(job_id=self._add(submission).job_id)

        return SimpleNamespace(submit=submit)

    def overlap_refused(self, submission: Submission) -> bool:
        return False

    def _add(self, submission: Submission) -> FakeJob:
        names = list(submission.argv_of)
        self.submissions += names
        agents = [Agent(name, str(step)) for step, name in enumerate(names)]
        job_id = str(len(self.jobs) + 1)
        load_s = 4.0 if agents[0].is_router else self.draw("load")
        job = FakeJob(
            job_id, f"{names[0]}:storm", agents, submission.after, self.limit_s, self.now, load_s, self.draw("drain")
        )
        self.release_at[job_id] = self.now + self.draw("queue")
        self.jobs[job_id] = job
        self.log(f"job {job_id}: {', '.join(names)} submitted" + (f" after {job.after}" if job.after else ""))
        return job

    def drain_calls(self, _run: RunDir, records: Sequence[Record], *_: object) -> list[Record]:
        refused = []
        for record in records:
            found = self.agent_of(record)
            if found is None:
                refused.append(record)
            else:
                self.asked_to_end(*found)
                self._drain(*found, reason="the drain call")
        return refused

    async def unanswering(self, records: Sequence[Record]) -> dict[str, bool]:
        """As `liveness`: the replicas that do not answer, and whether their node can be reached."""
        lost = self.lost
        jobs = {
            record.replica: self.jobs.get(str(record.job_id)) for record in records if self.agent_of(record) is None
        }
        return {replica: job is None or job.node not in lost for replica, job in jobs.items()}

    async def accepting(self, records: Sequence[Record]) -> set[str]:
        """As `liveness`: the URLs of the agents that run."""
        return {record.url for record in records if self.agent_of(record) is not None}

    async def refusing(self, records: Sequence[Record]) -> set[str]:
        """As `liveness`: the agents that have ended, on nodes that run."""
        jobs = {record.replica: self.jobs.get(str(record.job_id)) for record in records}
        ended = {agent.replica for job in self.jobs.values() for agent in job.agents if agent.phase == "ended"}
        return {name for name, job in jobs.items() if name in ended and job is not None and job.node not in self.lost}

    def agent_of(self, record: Record) -> tuple[FakeJob, Agent] | None:
        """The agent that answers at the address in the record."""
        job = self.jobs.get(str(record.job_id))
        if job is None or job.node in self.lost:
            return None
        for agent in job.agents:
            if agent.replica == record.replica and self._runs(job, agent) and not agent.hung:
                return job, agent
        return None

    # Time.

    def step(self, seconds: float) -> None:
        self.now += seconds
        for job in list(self.jobs.values()):
            self._update(job)
        for job in self.jobs.values():
            if job.state == "PENDING" and self._may_start(job):
                self._start(job)
        self.stamp_folders()

    def stamp_folders(self) -> None:
        """The folders that were written have the simulated time."""
        with os.scandir(self.run.jobs) as entries:
            for entry in entries:
                if entry.stat().st_mtime < BEGAN:
                    os.utime(entry.path, (self.now, self.now))

    def _may_start(self, job: FakeJob) -> bool:
        before = self.jobs.get(job.after) if job.after is not None else None
        return self.now >= self.release_at[job.job_id] and (before is None or before.over)

    def _start(self, job: FakeJob) -> None:
        size = sum(not agent.is_router for agent in job.agents)
        excluded = self.excluded()
        node = next(
            (n for n, free in self.nodes.items() if free >= size and n not in self.lost and n not in excluded), None
        )
        if node is None or self.now < self.away_until:
            return
        self.nodes[node] -= size
        job.state, job.node, job.started_at = "RUNNING", node, self.now
        for agent in job.agents:
            folder = JobDir(self.run, agent.replica)
            info, stop = folder.info(), folder.stop()
            other = info is not None and info.job_id != job.job_id
            if folder.exit() is not None or folder.ended() is not None or other:
                agent.phase = "ended"  # as batch.sh does
            elif stop is not None and stop.cancel_at is not None:
                self._end_agent(job, agent, Exit(True, FailureReason.DRAINED, "asked to end before", at=self.now))
            else:
                folder.write(Process(1, 1, node, agent.step, started_at=self.now))
                agent.phase, agent.ready_at = "loading", self.now + job.load_s
                self._publish(job, agent)
        self._end_if_empty(job)

    def excluded(self) -> Mapping[str, object]:
        return self.run.read_desired().get("excluded_nodes") or {}

    def _update(self, job: FakeJob) -> None:
        if job.state != "RUNNING":
            return
        if job.node in self.lost:
            if self.now >= self.lost[job.node] + DETECT_S and self.now >= self.away_until:
                self.end(job, "CANCELLED" if job.cancelled else "NODE_FAIL")
            return
        assert job.ends_at is not None
        for agent in job.agents:
            self._update_agent(job, agent)
        if not job.warned and self.now >= job.ends_at - self.warn_s - self.draw("early"):
            job.warned = True
            for agent in job.agents:
                self._drain(job, agent, reason="SIGUSR2")
        if self.now >= job.ends_at:
            self.kill(job, job.agents, final="TIMEOUT")
        elif job.kill_at is not None and self.now >= job.kill_at:
            self.kill(job, job.agents, final=job.final)
        self._end_if_empty(job)

    def _update_agent(self, job: FakeJob, agent: Agent) -> None:
        if agent.hung or self.now < self.stalled_until:
            return
        if agent.phase == "loading" and agent.ready_at is not None and self.now >= agent.ready_at:
            agent.phase = "ready"
            self._publish(job, agent)
        if agent.phase == "draining" and agent.ends_at is not None and self.now >= agent.ends_at:
            self._end_agent(job, agent, replace(Exit.drained("drained", cut=0), at=self.now))
        elif self._runs(job, agent) and self.now >= agent.beat_at + BEAT_S:
            self._publish(job, agent)

    def _publish(self, job: FakeJob, agent: Agent) -> None:
        """Its record in the registry and its progress."""
        phase = {"loading": JobPhase.LOADING, "ready": JobPhase.READY, "draining": JobPhase.DRAINING}[agent.phase]
        state = {"loading": State.STARTING, "ready": State.READY, "draining": State.DRAINING}[agent.phase]
        was_ready = agent.ready_at is not None and agent.ready_at <= self.now
        folder, (expert, _, generation) = JobDir(self.run, agent.replica), split_replica(agent.replica)
        before = folder.progress()
        if before is None or before.phase is not phase:
            folder.write(JobProgress(phase, at=self.now, ready_at=agent.ready_at if was_ready else None))
        agent.beat, agent.beat_at = agent.beat + 1, self.now
        kind = RecordKind.ROUTER if agent.is_router else RecordKind.EXPERT
        record = Record(
            kind, agent.replica, f"http://127.0.0.1:1/{agent.replica}", state, {expert: "m"}, generation, nonce="n",
            job_id=job.job_id, node=job.node, beat=agent.beat, beat_s=BEAT_S, expires_at=job.ends_at,
        )  # fmt: skip
        registry.publish(self.run.registry, record)

    @staticmethod
    def _runs(job: FakeJob, agent: Agent) -> bool:
        return job.state == "RUNNING" and agent.phase in ("loading", "ready", "draining")

    # What happens to jobs.

    def _drain(self, job: FakeJob, agent: Agent, *, reason: str) -> None:
        if agent.hung or agent.phase not in ("loading", "ready") or job.node in self.lost:
            return
        self.log(f"{agent.replica} drains after {reason}")
        was_ready = agent.phase == "ready"
        agent.phase, agent.ends_at = "draining", self.now + (job.drain_s if was_ready else 0.0)
        if was_ready:
            self._publish(job, agent)
            return
        reasons = {"SIGUSR2": FailureReason.WALLTIME, "SIGTERM": FailureReason.CANCELLED}
        stopped = JobDir(self.run, agent.replica).stop() is not None
        blame = FailureReason.DRAINED if stopped else reasons.get(reason, FailureReason.DRAINED)
        self._end_agent(job, agent, Exit(stopped, blame, f"not ready before {reason}", at=self.now))

    def terminate(self, job: FakeJob, agents: Sequence[Agent]) -> None:
        for agent in agents:
            self._drain(job, agent, reason="SIGTERM")

    def kill(self, job: FakeJob, agents: Sequence[Agent], *, final: str | None = None) -> None:
        if job.node in self.lost or job.state != "RUNNING":
            return
        for agent in agents:
            if agent.phase != "ended":
                self._end_agent(job, agent, None, status=137)
            agent.unknown = False
        job.final = final or job.final
        self._end_if_empty(job)

    def crash(self, job: FakeJob, agent: Agent, reason: FailureReason) -> None:
        job.final = "FAILED" if len(job.agents) == 1 else job.final
        self._end_agent(job, agent, Exit(False, reason, "it failed", at=self.now), status=1)
        self._end_if_empty(job)

    def vanish(self, job: FakeJob) -> None:
        """The kernel kills agent and batch script together."""
        for agent in job.agents:
            agent.phase = "ended"
        self.end(job, "OUT_OF_MEMORY")

    def lose_step(self, job: FakeJob) -> None:
        """Agent, batch script and slurmstepd are killed together: Slurm says that the job runs until it is ended."""
        for agent in job.agents:
            agent.phase, agent.unknown = "ended", True

    def preempt(self, job: FakeJob, grace_s: float) -> None:
        job.final, job.kill_at = "PREEMPTED", self.now + grace_s
        self.terminate(job, job.agents)

    def lose_node(self, node: str) -> None:
        self.lost[node] = self.now

    def restore_node(self, node: str) -> None:
        """With it the controller learns that its jobs are gone."""
        for job in self.jobs.values():
            if job.state == "RUNNING" and job.node == node:
                self.end(job, "CANCELLED" if job.cancelled else "NODE_FAIL")
        self.lost.pop(node, None)

    def _end_agent(self, job: FakeJob, agent: Agent, end: Exit | None, *, status: int = 0) -> None:
        folder = JobDir(self.run, agent.replica)
        agent.phase = "ended"
        if end is not None:
            folder.write(end)
            registry.withdraw(self.run.registry, agent.replica)
        folder.write(Ended(status, self.now))

    def _end_if_empty(self, job: FakeJob) -> None:
        if job.state == "RUNNING" and all(agent.phase == "ended" and not agent.unknown for agent in job.agents):
            self.end(job, job.final)

    def end(self, job: FakeJob, state: str) -> None:
        if job.node is not None:
            self.nodes[job.node] += sum(not agent.is_router for agent in job.agents)
        for agent in job.agents:
            agent.phase = "ended"
        job.state, job.ended_at = state, self.now
        self.log(f"job {job.job_id} ({', '.join(agent.replica for agent in job.agents)}) ended: {state}")
