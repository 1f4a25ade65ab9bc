"""Reads the observed state of a run from `jobs/`, the registry and the launcher, for the control loop and the commands.

If a job ended without an exit record, the observer writes one, so that each failure has a time and all readers see the
same reason. It writes one for a claim whose submitting process is gone; if that process did submit a job, the job's
agent reads this record and ends. It writes one for a job whose node is off, because Slurm may notice that minutes
later, and then says only that the job was cancelled. Jobs that have ended are not read again, because an old run has
many.
"""

import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from typing import Final

from hpc_router.cluster.control_loop.liveness import HangDetector
from hpc_router.cluster.control_loop.slots import CLAIM_S, Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState, Launcher
from hpc_router.cluster.launchers.slurm.launcher import REASONS, STATES
from hpc_router.errors import RegistryError
from hpc_router.state.atomic_files import create_text, refresh_folder
from hpc_router.state.job_reader import JobReader, JobRecords
from hpc_router.state.job_records import Exit, FailureReason, JobDir, Runner, Stop
from hpc_router.state.registry import Record, RecordKind, RegistryReader, split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

MIN_QUERY_INTERVAL_S: Final = 5.0
"""Minimum interval in seconds between queries to the Slurm controller about lost replicas."""
HUNG_MESSAGE: Final = "its agent hung: it renewed no lease and answered no call while its process ran; it was killed"
GONE_MESSAGE: Final = "its agent was gone: its port refused connections, while Slurm reported that its job runs"
EXPLAINED_S: Final = 300.0
"""Time in seconds after which Slurm no longer knows an ended job (MinJobAge)."""
_FROM_OUTSIDE: Final = (
    FailureReason.PREEMPTED,
    FailureReason.CANCELLED,
    FailureReason.NODE_FAILED,
    FailureReason.OUT_OF_MEMORY,
)
_OURS: Final = (None, FailureReason.CANCELLED, FailureReason.KILLED)
"""What a launcher reports of a silent job that the control loop has ended."""
ABANDONED_MESSAGE: Final = "it was claimed, but not submitted: the process that submits it is gone"
VANISHED_MESSAGE: Final = "the job ended without an exit record: it was killed, or failed before it started"


class RunObserver:
    """Observes one run. With `read_only` it writes nothing, not even a missing exit record."""

    def __init__(
        self,
        run: RunDir,
        launcher: Launcher,
        *,
        reader: JobReader | None = None,
        clock: Callable[[], float] = time.monotonic,
        read_only: bool = False,
    ) -> None:
        self._run, self._read_only = run, read_only
        self._jobs = reader or JobReader(run)
        self._clock = clock
        self._launcher = launcher
        self._reader = RegistryReader(run.registry)
        self._ended: dict[str, Attempt] = {}
        self._unexplained: set[str] = set()  # drained jobs whose final state in Slurm is not known yet
        self._hang_detector = HangDetector()
        self._hung: set[str] = set()
        self._off: set[str] = set()
        self._gone: set[str] = set()
        self._queried: set[str] = set()  # lost replicas about which the controller was queried
        self._queried_at = -math.inf
        self.records: Mapping[str, Record] = {}
        self.lost: Sequence[str] = ()
        """The replicas about which the last observation queried the controller."""

    def observe(self, *, fresh: bool = False) -> Observed:
        """Returns the attempts of each slot, oldest first. `fresh`: whether to query the Slurm controller now. Raises
        OSError if the run directory cannot be read."""
        names = self._claimed()
        open_names = [name for name in names if name not in self._ended or name in self._unexplained]
        reports = self._launcher.observe(open_names, fresh=fresh)
        read_at = self._clock()  # must come after the query, which may take 30 s, and before the records are read
        self.read_records()
        self.lost = self._lost(reports, read_at=read_at)
        if self.lost:
            reports = self._launcher.observe(open_names, fresh=True)
        slots: dict[Slot, list[Attempt]] = defaultdict(list)
        for name in self._unexplained & reports.keys():
            self._explain(name, reports[name])
        for name in names:
            attempt = self._ended.get(name) or self._attempt(name, reports[name])
            if attempt is not None:
                slots[attempt.slot].append(attempt)
        return {slot: tuple(sorted(found, key=attrgetter("generation"))) for slot, found in slots.items()}

    def read_records(self) -> Mapping[str, Record]:
        """Reads and returns the registry's records by replica. Raises OSError if the registry cannot be read."""
        self.records = self._reader.snapshot()
        return self.records

    def _lost(self, reports: Mapping[str, JobReport], *, read_at: float) -> list[str]:
        """Returns the replicas that have become silent since the last query. Their jobs may have ended, so the caller
        queries Slurm now. Each lost replica is returned once, and none within MIN_QUERY_INTERVAL_S of the last query.
        Routers are left out, because this loop ends with its router."""
        running = [name for name, report in reports.items() if report.state is JobState.RUNNING]
        records = [self.records[name] for name in running if name in self.records]
        silent = self._hang_detector.silent(
            [record for record in records if record.kind is RecordKind.EXPERT], read_at=read_at
        )
        self._hung.difference_update(running)
        self._hung |= silent.hung
        self._off = silent.off
        self._gone.difference_update(running)
        self._gone |= silent.gone
        self._queried &= silent.lost
        newly_lost = silent.lost - self._queried
        if not newly_lost or read_at - self._queried_at < MIN_QUERY_INTERVAL_S:
            return []
        logger.warning("no beat and no answer: asking Slurm for the jobs of %s", ", ".join(sorted(newly_lost)))
        self._queried |= newly_lost
        self._queried_at = read_at
        return sorted(newly_lost)

    def _claimed(self) -> list[str]:
        """Returns the replicas that have a folder in `jobs/`."""
        with os.scandir(self._run.jobs) as entries:
            names = [e.name for e in entries if e.name in self._ended or (_is_replica(e.name) and e.is_dir())]
        self._jobs.keep_only(name for name in names if name not in self._ended or name in self._unexplained)
        self._ended = {name: self._ended[name] for name in names if name in self._ended}
        self._unexplained &= self._ended.keys()
        return names

    def _attempt(self, replica: str, report: JobReport) -> Attempt | None:
        job = self._jobs.read(replica)
        if job is None:
            return None
        expert, slot, generation = split_replica(replica)
        end, stop, state = job.exit, job.stop or Stop(), report.state
        if state is JobState.ENDED and end is None:
            end = self._record(replica, self._end(job, report, stop))
        elif end is None and replica in self._off and job.info is not None and job.info.runner is not Runner.PROCESS:
            end = self._record(replica, _node_off(report))
        elif end is None and state is JobState.ENDING and self._was_not_begun(job):
            end = self._record(replica, Exit(ok=False, reason=FailureReason.NODE_FAILED, message=_not_begun(report)))
        record, info, process = self.records.get(replica), job.info, job.process
        submitting = info is None and job.submitter is not None and job.submitter.is_alive
        if info is None and end is None and not submitting and time.time() >= job.claimed_at + CLAIM_S:
            end = self._record(replica, Exit(ok=False, reason=FailureReason.UNANSWERED, message=ABANDONED_MESSAGE))
        expires_at = report.ends_at if report.ends_at is not None or record is None else record.expires_at
        attempt = Attempt(
            slot=Slot(expert, slot),
            generation=generation,
            report=report,
            claimed_at=job.claimed_at,
            submitted=state is not JobState.PENDING or info is not None,
            exit=end,
            progress=job.progress,
            stop=stop,
            registered=record.state if record is not None else None,
            job_id=info.job_id if info is not None else None,
            node=report.node,
            hung=state is JobState.RUNNING and replica in self._hung,
            submitting=submitting,
            runner=info.runner if info is not None else None,
            submitted_at=info.submitted_at if info is not None else None,
            started_at=process.started_at if process is not None else None,
            after=info.after if info is not None else None,
            revision=info.revision if info is not None else None,
            expires_at=expires_at,
        )
        if state is JobState.ENDED:
            self._ended[replica] = attempt
            if end is not None and end.reason is FailureReason.DRAINED and not attempt.stop_requested:
                self._unexplained.add(replica)
                return self._explain(replica, report)
        return attempt

    def _was_not_begun(self, job: JobRecords) -> bool:
        """Returns whether a Slurm job that is ending never ran, because its node did not start the batch script. Slurm
        would start such a job again on another node, even though requeue is forbidden. Returns False for a job that was
        asked to end, and for one that may have run on a node that does not see the run directory."""
        begun = job.process is not None or job.ended is not None or job.stop is not None
        if begun or job.info is None or job.info.runner is not Runner.SLURM:
            return False
        return not _has_batch_log(JobDir(self._run, job.replica)) and self._seen_by_others(job.replica)

    def _seen_by_others(self, replica: str) -> bool:
        """Returns whether another replica's job has written to the run directory."""
        others = (JobDir(self._run, name) for name in self._claimed() if name != replica)
        return any(other.process() is not None or _has_batch_log(other) for other in others)

    def _record(self, replica: str, end: Exit) -> Exit:
        return end if self._read_only else record_exit(JobDir(self._run, replica), end)

    def _explain(self, replica: str, report: JobReport) -> Attempt:
        """Returns the attempt of a job that drained although no request to drain is recorded, with the reason that
        Slurm gives. The job knew only that it got a signal, so a reason such as preemption replaces the one that it
        recorded. Slurm may report that reason later than the end, so later passes call this again for EXPLAINED_S. If
        Slurm has forgotten the job, the recorded reason stays."""
        attempt, word = self._ended[replica], report.native_state or ""
        assert attempt.exit is not None
        final, reason, end = STATES.get(word) is JobState.ENDED, REASONS.get(word), attempt.exit
        if final and reason is not None and reason in _FROM_OUTSIDE:
            end = replace(end, reason=reason, message=f"{end.message}; Slurm says {word}")
            if not self._read_only:
                job = JobDir(self._run, replica)
                job.write(end)
                _log_end(job, end)
            attempt = self._ended[replica] = replace(attempt, exit=end)
        if final or time.time() - end.at >= EXPLAINED_S:
            self._unexplained.discard(replica)
        return attempt

    def _end(self, job: JobRecords, report: JobReport, stop: Stop) -> Exit:
        """Returns the exit record for a job that ended and wrote none. If even the job's batch script wrote no log, its
        node does not see the run directory. The reason is then NODE_FAILED if other nodes have seen the directory, else
        RUN_UNSEEN, because every job would fail in the same way."""
        said = report.end.reason if report.end is not None else None
        if report.end is not None and said is FailureReason.NODE_FAILED:
            return report.end
        if job.replica in self._off and said in _OURS:
            return _node_off(report)
        if (stop.drain_at or stop.cancel_at) is not None and job.replica not in self._hung:
            return Exit(ok=True, reason=FailureReason.DRAINED, message="it was asked to end, and left no exit record")
        if job.replica in self._hung and said in _OURS:
            if job.replica not in self._gone:
                return Exit(ok=False, reason=FailureReason.TIMEOUT, message=HUNG_MESSAGE)
            if said is not FailureReason.KILLED:  # else the batch script has recorded the signal
                return Exit(ok=False, reason=FailureReason.VANISHED, message=GONE_MESSAGE)
        if report.end is not None and said is not FailureReason.KILLED:
            return report.end
        info = job.info
        if info is not None and info.runner is Runner.SLURM and not _has_batch_log(JobDir(self._run, job.replica)):
            seen = self._seen_by_others(job.replica)
            reason = FailureReason.NODE_FAILED if seen else FailureReason.RUN_UNSEEN
            where = f"node {report.node}" if report.node else "its node"
            message = f"{where} does not see the run directory {self._run.path}: the batch script wrote no log there"
            return Exit(ok=False, reason=reason, message=message)
        return report.end or Exit(ok=False, reason=FailureReason.VANISHED, message=VANISHED_MESSAGE)


def _node_off(report: JobReport) -> Exit:
    where = f"node {report.node}" if report.node else "its node"
    message = f"{where} is off: its agent renewed no lease, and the node neither accepted nor refused a connection"
    return Exit(ok=False, reason=FailureReason.NODE_FAILED, message=message)


def _not_begun(report: JobReport) -> str:
    return f"node {report.node} did not start the job" if report.node else "its node did not start the job"


def _has_batch_log(job: JobDir) -> bool:
    refresh_folder(job.path)  # without this, an NFS client may not see a log that exists
    return any(job.path.glob("*_batch.log"))


def record_exit(job: JobDir, end: Exit) -> Exit:
    """Writes `end` to the job's `exit.json` and logs it, unless the file exists. Returns the record in the file."""
    if create_text(job.path / "exit.json", json.dumps(asdict(end), indent=1, sort_keys=True) + "\n"):
        _log_end(job, end)
    return job.exit() or end


def _log_end(job: JobDir, end: Exit) -> None:
    expert = split_replica(job.replica)[0]
    job.run.event("ended", replica=job.replica, expert=expert, reason=end.reason.value, message=end.message)


def _is_replica(name: str) -> bool:
    try:
        split_replica(name)
    except RegistryError:
        return False
    return True
