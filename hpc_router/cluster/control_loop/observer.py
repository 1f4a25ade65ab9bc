"""Reads the observed state of a run from `jobs/`, the registry and the launcher, for the control loop and the verbs.

A job that ended without an exit record gets one here, so that each failure has a time and all readers see the same
reason. Jobs that have ended are not read again, because an old run has many.
"""

import json
import logging
import math
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Final

from hpc_router.cluster.control_loop.liveness import HangDetector
from hpc_router.cluster.control_loop.slots import Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState, Launcher
from hpc_router.errors import RegistryError
from hpc_router.state.atomic_files import create_text, refresh_folder
from hpc_router.state.job_records import Exit, FailureReason, JobDir, Runner, Stop, Submitter, start_ticks
from hpc_router.state.registry import Record, RecordKind, RegistryReader, split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

MIN_QUERY_INTERVAL_S: Final = 5.0
"""The Slurm controller is queried about lost replicas no more often than this."""
HUNG_MESSAGE: Final = "its agent hung: it renewed no lease and answered no call while its process ran; it was killed"
VANISHED_MESSAGE: Final = "the job ended without an exit record: it was killed, or failed before it started"


class RunObserver:
    """Observes one run. With `read_only` it writes nothing, not even a missing exit record."""

    def __init__(
        self, run: RunDir, launcher: Launcher, *, clock: Callable[[], float] = time.monotonic, read_only: bool = False
    ) -> None:
        self._run, self._read_only = run, read_only
        self._clock = clock
        self._launcher = launcher
        self._reader = RegistryReader(run.registry)
        self._ended: dict[str, Attempt] = {}
        self._hang_detector = HangDetector()
        self._hung: set[str] = set()
        self._queried: set[str] = set()  # lost replicas about which the controller was queried
        self._queried_at = -math.inf
        self.records: Mapping[str, Record] = {}
        self.lost: Sequence[str] = ()
        """The replicas about which the last observation queried the controller."""

    def observe(self, *, fresh: bool = False) -> Observed:
        """Returns the attempts of each slot. Raises OSError if the run directory cannot be read. `fresh`: query the
        controller now."""
        names = self._claimed()
        open_names = [name for name in names if name not in self._ended]
        reports = self._launcher.observe(open_names, fresh=fresh)
        read_at = self._clock()  # after the query, which may take 30 s, and before the records are read
        self.records = self._reader.snapshot()
        self.lost = self._lost(reports, read_at=read_at)
        if self.lost:
            reports = self._launcher.observe(open_names, fresh=True)
        slots: dict[Slot, list[Attempt]] = defaultdict(list)
        for name in names:
            attempt = self._ended.get(name) or self._attempt(name, reports[name])
            if attempt is not None:
                slots[attempt.slot].append(attempt)
        return {slot: tuple(sorted(found, key=lambda a: a.generation)) for slot, found in slots.items()}

    def _lost(self, reports: Mapping[str, JobReport], *, read_at: float) -> list[str]:
        """Returns the replicas about which to query the controller now: once for each replica that is newly lost,
        because its job may have ended. Routers are left out, because this loop ends with its router."""
        running = [name for name, report in reports.items() if report.state is JobState.RUNNING]
        records = [self.records[name] for name in running if name in self.records]
        silent = self._hang_detector.silent(
            [record for record in records if record.kind is RecordKind.EXPERT], read_at=read_at
        )
        self._hung.difference_update(running)
        self._hung |= silent.hung
        self._queried &= silent.lost
        newly_lost = silent.lost - self._queried
        if not newly_lost or read_at - self._queried_at < MIN_QUERY_INTERVAL_S:
            return []
        logger.warning("no beat and no answer: asking Slurm for the jobs of %s", ", ".join(sorted(newly_lost)))
        self._queried |= newly_lost
        self._queried_at = read_at
        return sorted(newly_lost)

    def _claimed(self) -> list[str]:
        with os.scandir(self._run.jobs) as entries:
            return [entry.name for entry in entries if _is_replica(entry.name) and entry.is_dir()]

    def _attempt(self, replica: str, report: JobReport) -> Attempt | None:
        expert, slot, generation = split_replica(replica)
        job = JobDir(self._run, replica)
        try:
            claimed_at = job.claimed_at()
        except FileNotFoundError:
            return None
        end, stop, state = job.exit(), job.stop() or Stop(), report.state
        if state is JobState.ENDED and end is None:
            end = self._end(replica, report, stop)
            end = end if self._read_only else record_exit(job, end)
        record, info, process = self.records.get(replica), job.info(), job.process()
        expires_at = report.ends_at if report.ends_at is not None or record is None else record.expires_at
        attempt = Attempt(
            slot=Slot(expert, slot),
            generation=generation,
            report=report,
            claimed_at=claimed_at,
            submitted=state is not JobState.PENDING or info is not None,
            exit=end,
            progress=job.progress(),
            stop=stop,
            registered=record.state if record is not None else None,
            job_id=info.job_id if info is not None else None,
            node=report.node,
            hung=state is JobState.RUNNING and replica in self._hung,
            submitting=info is None and _is_alive(job.submitter()),
            runner=info.runner if info is not None else None,
            submitted_at=info.submitted_at if info is not None else None,
            started_at=process.started_at if process is not None else None,
            after=info.after if info is not None else None,
            revision=info.revision if info is not None else None,
            expires_at=expires_at,
        )
        if state is JobState.ENDED:
            self._ended[replica] = attempt
        return attempt

    def _end(self, replica: str, report: JobReport, stop: Stop) -> Exit:
        """Returns the exit of a job that wrote none itself. If no node has seen the run directory yet, another job
        would fail in the same way; otherwise this node is the cause."""
        if (stop.drain_at or stop.cancel_at) is not None and replica not in self._hung:
            return Exit(ok=True, reason=FailureReason.DRAINED, message="it was asked to end, and left no exit record")
        if report.end is not None and report.end.reason is not FailureReason.KILLED:
            return report.end
        if replica in self._hung:
            return Exit(ok=False, reason=FailureReason.TIMEOUT, message=HUNG_MESSAGE)
        job = JobDir(self._run, replica)
        info = job.info()
        if info is not None and info.runner is Runner.SLURM and not _has_batch_log(job):
            others = (JobDir(self._run, name) for name in self._claimed() if name != replica)
            seen = any(other.process() is not None or _has_batch_log(other) for other in others)
            reason = FailureReason.NODE_FAILED if seen else FailureReason.RUN_UNSEEN
            where = f"node {report.node}" if report.node else "its node"
            message = f"{where} does not see the run directory {self._run.path}: the batch script wrote no log there"
            return Exit(ok=False, reason=reason, message=message)
        return report.end or Exit(ok=False, reason=FailureReason.VANISHED, message=VANISHED_MESSAGE)


def _has_batch_log(job: JobDir) -> bool:
    refresh_folder(job.path)  # or an NFS client may not see a log that exists
    return any(job.path.glob("*_batch.log"))


def record_exit(job: JobDir, end: Exit) -> Exit:
    """Write `exit.json` unless the job has written it; returns the one in the file."""
    create_text(job.path / "exit.json", json.dumps(asdict(end), indent=1, sort_keys=True) + "\n")
    return job.exit() or end


def _is_alive(submitter: Submitter | None) -> bool:
    """Returns whether the submitter runs on this host. One of another host counts as gone; then the age of its claim
    decides."""
    here = submitter is not None and submitter.host == socket.gethostname()
    return here and submitter is not None and start_ticks(submitter.pid) == submitter.start_ticks


def _is_replica(name: str) -> bool:
    try:
        split_replica(name)
    except RegistryError:
        return False
    return True
