"""One look at a run: what it makes of records and reports that were not read at the same moment."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hpc_router.cluster.launcher import JobReport, JobState
from hpc_router.cluster.observe import Observer
from hpc_router.cluster.pulse import HUNG_BEATS
from hpc_router.jobdir import JobDir, JobInfo, Runner
from hpc_router.registry import Kind, Record, State, publish
from hpc_router.rundir import RunDir

BEAT_S = 2.0
RECORD = Record(Kind.EXPERT, "math-0.g1", "http://127.0.0.1:1", State.READY, {}, nonce="n", beat=1, beat_s=BEAT_S)


class SlowController:
    """A job that runs, by the word of a controller that takes so long to say so that the agent, `renewing`, has
    renewed its record meanwhile."""

    def __init__(self, run: RunDir, *, renewing: bool) -> None:
        self.run, self.renewing = run, renewing
        self.now, self.beat = 0.0, 1

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        self.now += HUNG_BEATS * BEAT_S
        if self.renewing:
            self.beat += HUNG_BEATS
            publish(self.run.registry, replace(RECORD, beat=self.beat))
        return {replica: JobReport(JobState.RUNNING) for replica in replicas}

    def submit(self, requests: object) -> list[str]:
        raise AssertionError("nothing is submitted by a look")

    def cancel(self, replicas: Iterable[str]) -> None:
        raise AssertionError("nothing is cancelled by a look")

    kill = cancel

    def remaining(self, replicas: Iterable[str]) -> list[str]:
        return []


def hung(run: RunDir, *, renewing: bool) -> list[bool]:
    """Of three looks in a row."""
    job = JobDir(run, RECORD.replica)
    job.claim()
    job.write(JobInfo("7", "login1", runner=Runner.SLURM))
    publish(run.registry, RECORD)
    controller = SlowController(run, renewing=renewing)
    observer = Observer(run, controller, clock=lambda: controller.now)
    return [next(iter(observer.look().values()))[0].hung for _ in range(3)]


def test_a_controller_that_answers_late_makes_no_agent_look_hung(run: RunDir) -> None:
    """The age of a beat ends when it was read: no probe by a busy node has to save the replica."""
    assert hung(run, renewing=True) == [False, False, False]


def test_beats_that_stopped_are_missed_all_the_same(run: RunDir) -> None:
    assert hung(run, renewing=False) == [False, True, True]
