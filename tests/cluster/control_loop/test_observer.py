"""One observation of a run, from records and reports that were not read at the same moment."""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest

from hpc_router.cluster.control_loop import liveness
from hpc_router.cluster.control_loop.liveness import HUNG_BEATS, LATE_BEATS, LOST_BEATS
from hpc_router.cluster.control_loop.observer import GONE_MESSAGE, MIN_QUERY_INTERVAL_S, RunObserver
from hpc_router.cluster.control_loop.slots import CLAIM_S
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.state.job_records import (
    Ended,
    Exit,
    FailureReason,
    JobDir,
    JobInfo,
    Process,
    Runner,
    Stop,
    Submitter,
    start_ticks,
)
from hpc_router.state.registry import Record, RecordKind, State, publish
from hpc_router.state.run_directory import RunDir

BEAT_S = 2.0
RECORD = Record(RecordKind.EXPERT, "math-0.g1", "http://127.0.0.1:1", State.READY, {}, nonce="n", beat=1, beat_s=BEAT_S)


class Slurm:
    """A controller with one running job. It answers only `fresh` queries."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, 0
        self.truth = self.said = JobState.RUNNING

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        if fresh:
            self.asked += 1
            self.said = self.truth
        return {replica: JobReport(self.said) for replica in replicas}

    def submit(self, requests: object) -> list[str]:
        raise AssertionError("nothing is submitted by a look")

    def cancel(self, replicas: Iterable[object]) -> None:
        raise AssertionError("nothing is cancelled by a look")

    kill = release = cancel

    def remaining(self, replicas: Iterable[str]) -> list[str]:
        return []

    def update_exclusions(self, requests: object) -> list[str]:
        raise AssertionError("nothing is changed by a look")

    def trouble(self) -> str | None:
        return None


class Waiting(Slurm):
    """No job has started."""

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        return {replica: JobReport(JobState.PENDING) for replica in replicas}


class SlowController(Slurm):
    """A controller whose answer takes so long that the agent renews its record meanwhile, if `renewing`."""

    def __init__(self, run: RunDir, *, renewing: bool) -> None:
        super().__init__()
        self.run, self.renewing, self.beat = run, renewing, 1

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        self.now += HUNG_BEATS * BEAT_S
        if self.renewing:
            self.beat += HUNG_BEATS
            publish(self.run.registry, replace(RECORD, beat=self.beat))
        return super().observe(replicas, fresh=fresh)


def submitted(run: RunDir, record: Record) -> None:
    job = JobDir(run, record.replica)
    job.claim()
    job.write(JobInfo("7", "login1", runner=Runner.SLURM))
    publish(run.registry, record)


def hung(run: RunDir, *, renewing: bool) -> list[bool]:
    """Whether the replica counts as hung, for three observations in a row."""
    submitted(run, RECORD)
    controller = SlowController(run, renewing=renewing)
    observer = RunObserver(run, controller, clock=lambda: controller.now)
    return [next(iter(observer.observe().values()))[0].hung for _ in range(3)]


def test_a_slow_controller_makes_no_agent_hung(run: RunDir) -> None:
    """The age of a beat is measured when the record is read, not after the controller's answer."""
    assert hung(run, renewing=True) == [False, False, False]


def test_stopped_beats_are_noticed_with_a_slow_controller(run: RunDir) -> None:
    assert hung(run, renewing=False) == [False, True, True]


def test_the_controller_is_queried_once_for_a_lost_replica(run: RunDir) -> None:
    """A job that ended without a record is thus replaced before the next periodic query."""
    slurm = Slurm()
    submitted(run, RECORD)
    observer = RunObserver(run, slurm, clock=lambda: slurm.now)
    seen = []
    for _ in range(HUNG_BEATS + 1):
        (attempt,) = next(iter(observer.observe().values()))
        seen.append((slurm.asked, list(observer.lost), attempt.hung))
        slurm.now += BEAT_S
    assert seen == [
        *[(0, [], False)] * LOST_BEATS,
        (1, [RECORD.replica], False),
        *[(1, [], False)] * (HUNG_BEATS - LOST_BEATS - 1),
        (1, [], True),
    ]


def test_a_lost_job_that_ended_is_seen_in_the_same_observation(run: RunDir) -> None:
    slurm = Slurm()
    submitted(run, RECORD)
    observer = RunObserver(run, slurm, clock=lambda: slurm.now)
    observer.observe()
    slurm.truth = JobState.ENDED
    slurm.now = LOST_BEATS * BEAT_S
    (attempt,) = next(iter(observer.observe().values()))
    assert attempt.job is JobState.ENDED
    assert attempt.exit is not None


def test_losses_that_follow_each_other_share_a_query(run: RunDir) -> None:
    """The controller is queried at most once per MIN_QUERY_INTERVAL_S, and about every lost replica."""
    slurm = Slurm()
    names = [f"math-{number}.g1" for number in range(3)]
    records = [replace(RECORD, replica=name) for name in names]
    for record in records:
        submitted(run, record)
    observer = RunObserver(run, slurm, clock=lambda: slurm.now)
    observer.observe()
    told: list[tuple[float, list[str]]] = []
    for step in range(1, 9):
        slurm.now = step * BEAT_S
        for number, record in enumerate(records):  # each is renewed one beat longer than the one before
            if step <= number:
                publish(run.registry, replace(record, beat=1 + step))
        observer.observe()
        if observer.lost:
            told.append((slurm.now, list(observer.lost)))
    first = LOST_BEATS * BEAT_S
    assert told == [(first, names[:1]), (first + 3 * BEAT_S, names[1:])]
    assert 2 * BEAT_S < MIN_QUERY_INTERVAL_S <= 3 * BEAT_S
    assert slurm.asked == len(told)


def test_a_replica_that_is_lost_twice_is_queried_twice(run: RunDir) -> None:
    slurm = Slurm()
    submitted(run, RECORD)
    observer = RunObserver(run, slurm, clock=lambda: slurm.now)
    for beat in (1, 2):
        publish(run.registry, replace(RECORD, beat=beat))
        observer.observe()
        slurm.now += MIN_QUERY_INTERVAL_S
        observer.observe()
        slurm.now += MIN_QUERY_INTERVAL_S
    assert slurm.asked == 2


def claimed(run: RunDir, *, age_s: float) -> JobDir:
    job = JobDir(run, "math-0.g1")
    job.claim()
    at = time.time() - age_s
    os.utime(job.path, (at, at))
    return job


def test_a_claim_whose_submitter_is_gone_gets_an_exit_record(run: RunDir) -> None:
    """Its host may have died after sbatch: the job must find that it is not wanted."""
    job = claimed(run, age_s=CLAIM_S)
    (attempt,) = next(iter(RunObserver(run, Waiting()).observe().values()))
    end = job.exit()
    assert end is not None
    assert (end.reason, attempt.exit, attempt.live) == (FailureReason.UNANSWERED, end, False)


def test_a_claim_that_is_being_submitted_gets_none(run: RunDir) -> None:
    job = claimed(run, age_s=CLAIM_S - 30)
    RunObserver(run, Waiting()).observe()
    assert job.exit() is None
    job.write(Submitter(os.getpid(), start_ticks(os.getpid()) or 0, socket.gethostname()))
    old = time.time() - 2 * CLAIM_S
    for path in (job.path / "submitter.json", job.path):
        os.utime(path, (old, old))
    RunObserver(run, Waiting()).observe()
    assert job.exit() is None


class Explaining(Slurm):
    """The job's files say that it has ended; Slurm's word comes later."""

    word: str | None = None

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        self.names = list(replicas)
        return {replica: JobReport(JobState.ENDED, native_state=self.word) for replica in self.names}


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("PREEMPTED", FailureReason.PREEMPTED),
        ("CANCELLED", FailureReason.CANCELLED),
        ("COMPLETED", FailureReason.DRAINED),
    ],
)
def test_slurm_tells_why_a_job_drained(run: RunDir, word: str, reason: FailureReason) -> None:
    """The agent's own record says only that it got SIGTERM, and is written before Slurm's state is known."""
    slurm, job = Explaining(), JobDir(run, "math-0.g1")
    submitted(run, RECORD)
    job.write(Exit.drained("drained after SIGTERM", cut=2))
    observer = RunObserver(run, slurm)
    seen = []
    for slurm.word in (None, "RUNNING", word, word):
        (attempt,) = next(iter(observer.observe().values()))
        assert attempt.exit is not None
        seen.append(attempt.exit.reason)
    assert seen == [FailureReason.DRAINED, FailureReason.DRAINED, reason, reason]
    assert slurm.names == []  # it is not asked for any more
    assert attempt.exit is not None
    assert job.exit() == attempt.exit
    assert (attempt.exit.ok, attempt.exit.cut) == (True, 2)
    ends = run.events.read_text().count(f'"reason": "{reason}"') if run.events.exists() else 0
    assert ends == (reason is not FailureReason.DRAINED)


def test_what_we_asked_to_end_was_not_cancelled_by_a_person(run: RunDir) -> None:
    slurm, job = Explaining(), JobDir(run, "math-0.g1")
    submitted(run, RECORD)
    job.write(Stop(cancel_at=time.time()))
    job.write(Exit.drained("drained after SIGTERM", cut=0))
    slurm.word = "CANCELLED"
    (attempt,) = next(iter(RunObserver(run, slurm).observe().values()))
    assert attempt.exit is not None
    assert attempt.exit.reason is FailureReason.DRAINED


class Ends(Slurm):
    """A controller that says of a job on n1 what `state`, `word` and `end` hold."""

    state, word = JobState.RUNNING, "RUNNING"
    end: Exit | None = None

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        return {r: JobReport(self.state, node="n1", native_state=self.word, end=self.end) for r in replicas}


def ends(run: RunDir) -> list[tuple[str, str]]:
    lines = run.events.read_text().splitlines() if run.events.exists() else []
    return [(e["replica"], e["reason"]) for e in map(json.loads, lines) if e["kind"] == "ended"]


def answer_none(monkeypatch: pytest.MonkeyPatch, *, reachable: bool) -> None:
    async def unanswering(records: Iterable[Record]) -> dict[str, bool]:
        return {record.replica: reachable for record in records}

    monkeypatch.setattr(liveness, "_unanswering", unanswering)


CANCELLED = Exit(ok=False, reason=FailureReason.CANCELLED, message="Slurm says CANCELLED on n1")


def test_a_node_that_is_off_is_recorded_once_whatever_slurm_says_later(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own scancel would else make it a job that a person cancelled, which is nobody's fault."""
    answer_none(monkeypatch, reachable=False)
    submitted(run, RECORD)
    slurm, job = Ends(), JobDir(run, RECORD.replica)
    observer = RunObserver(run, slurm, clock=lambda: slurm.now)
    observer.observe()
    assert job.exit() is None
    slurm.now = LOST_BEATS * BEAT_S
    (attempt,) = next(iter(observer.observe().values()))
    assert attempt.hung, "its successor is submitted now"
    found = job.exit()
    assert found is not None
    assert (found.ok, found.reason, "node n1 is off" in found.message) == (False, FailureReason.NODE_FAILED, True)
    job.write(Stop(cancel_at=time.time(), kill_at=time.time()))
    for state, word in ((JobState.ENDING, "COMPLETING"), (JobState.ENDED, "CANCELLED")):
        slurm.state, slurm.word, slurm.end = state, word, CANCELLED
        for each in (observer, RunObserver(run, slurm)):
            (attempt,) = next(iter(each.observe().values()))
            assert (attempt.exit, attempt.live) == (found, False)
    assert ends(run) == [(RECORD.replica, "node_failed")]


@pytest.mark.parametrize("word", ["CANCELLED", "OUT_OF_MEMORY", "killed"])
def test_an_agent_that_is_gone_is_replaced_and_its_end_explained_later(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """The loop's own scancel is no reason; Slurm's reason and the signal in the batch script's record are."""

    async def accepting(records: Iterable[Record]) -> set[str]:
        return {record.url for record in records}

    async def refusing(records: Iterable[Record]) -> set[str]:
        return {record.replica for record in records}

    monkeypatch.setattr(liveness, "_accepting", accepting)
    monkeypatch.setattr(liveness, "_refusing", refusing)
    submitted(run, RECORD)
    slurm, job = Ends(), JobDir(run, RECORD.replica)
    observer = RunObserver(run, slurm, clock=lambda: slurm.now)
    observer.observe()
    slurm.now = LATE_BEATS * BEAT_S
    (attempt,) = next(iter(observer.observe().values()))
    assert attempt.hung, "its successor is submitted now"
    assert observer.lost == [RECORD.replica], "Slurm was asked"
    assert job.exit() is None
    job.write(Stop(cancel_at=time.time()))
    (job.path / "7_batch.log").touch()
    reason = {"CANCELLED": FailureReason.CANCELLED, "OUT_OF_MEMORY": FailureReason.OUT_OF_MEMORY}.get(
        word, FailureReason.KILLED
    )
    slurm.state, slurm.word, slurm.end = JobState.ENDED, word, Exit(ok=False, reason=reason, message=word)
    (attempt,) = next(iter(observer.observe().values()))
    assert attempt.exit is not None
    vanished = (FailureReason.VANISHED, GONE_MESSAGE)
    assert (attempt.exit.reason, attempt.exit.message) == (vanished if word == "CANCELLED" else (reason, word))
    assert not attempt.exit.ok


@pytest.mark.parametrize("begun", ["no", "log", "process", "ended", "stop", "unseen"])
def test_a_node_that_did_not_start_a_job_failed(run: RunDir, begun: str) -> None:
    """Only the batch script's log, which slurmd makes first, tells such a job from one that is cleaned up after it ran.
    As long as no job has written to the run directory, it may be that no node sees it."""
    submitted(run, RECORD)
    other, job = JobDir(run, "law-0.g1"), JobDir(run, RECORD.replica)
    other.claim()
    if begun != "unseen":
        other.write(Process(1, 1, "n2"))
    match begun:
        case "log":
            (job.path / "7_batch.log").touch()
        case "process":
            job.write(Process(1, 1, "n1"))
        case "ended":
            job.write(Ended(143, time.time()))
        case "stop":
            job.write(Stop(cancel_at=time.time()))
    slurm = Ends()
    slurm.state, slurm.word, slurm.end = JobState.ENDING, "COMPLETING", CANCELLED
    RunObserver(run, slurm).observe()
    end = job.exit()
    assert (end is not None) is (begun == "no")
    if end is not None:
        assert (end.reason, end.message) == (FailureReason.NODE_FAILED, "node n1 did not start the job")


def test_slurm_names_the_failed_node_of_a_job_that_was_asked_to_end(run: RunDir) -> None:
    submitted(run, RECORD)
    slurm, job = Ends(), JobDir(run, RECORD.replica)
    job.write(Stop(drain_at=time.time()))
    slurm.state, slurm.word = JobState.ENDED, "NODE_FAIL"
    slurm.end = Exit(ok=False, reason=FailureReason.NODE_FAILED, message="Slurm says NODE_FAIL on n1")
    RunObserver(run, slurm).observe()
    assert job.exit() == slurm.end


def test_a_hung_agent_that_the_loop_cancelled_was_not_cancelled_by_a_person(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_none(monkeypatch, reachable=True)
    submitted(run, RECORD)
    slurm, job = Ends(), JobDir(run, RECORD.replica)
    observer = RunObserver(run, slurm, clock=lambda: slurm.now)
    observer.observe()
    slurm.now = HUNG_BEATS * BEAT_S
    (attempt,) = next(iter(observer.observe().values()))
    assert (attempt.hung, attempt.exit) == (True, None)
    slurm.state, slurm.word, slurm.end = JobState.ENDED, "CANCELLED", CANCELLED
    (attempt,) = next(iter(observer.observe().values()))
    found = job.exit()
    assert found is not None
    assert found.reason is FailureReason.TIMEOUT
