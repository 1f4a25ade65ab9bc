"""The phases of a job: which phase may follow which, and the registry state that the agent publishes in each phase
(docs/states.md)."""

import time
from dataclasses import dataclass, field
from typing import Final

from hpc_router.expert.engines import EngineFailure
from hpc_router.expert.staging.staging import StageReport
from hpc_router.state.job_records import JobPhase, JobProgress
from hpc_router.state.registry import State

TRANSITIONS: Final = {
    JobPhase.STARTING: {JobPhase.LOADING, JobPhase.RESTARTING, JobPhase.DRAINING},
    JobPhase.LOADING: {JobPhase.READY, JobPhase.RESTARTING, JobPhase.DRAINING},
    JobPhase.READY: {JobPhase.RESTARTING, JobPhase.DRAINING},
    JobPhase.RESTARTING: {JobPhase.LOADING, JobPhase.RESTARTING, JobPhase.DRAINING},
    JobPhase.DRAINING: set[JobPhase](),
}
PUBLISHED: Final = {JobPhase.READY: State.READY, JobPhase.DRAINING: State.DRAINING}


@dataclass(slots=True)
class JobLifecycle:
    """The current phase of one job, and its history for `progress.json`."""

    phase: JobPhase = JobPhase.STARTING
    failure: EngineFailure | None = None
    restarts: int = 0
    engine_pid: int | None = None
    ready_at: float | None = None
    load_s: float | None = None
    stage: StageReport = field(default_factory=StageReport)
    _loading_at: float = field(default=0.0, repr=False)

    @property
    def state(self) -> State:
        return PUBLISHED.get(self.phase, State.STARTING)

    def move(self, phase: JobPhase, *, failure: EngineFailure | None = None, engine_pid: int | None = None) -> None:
        if phase not in TRANSITIONS[self.phase]:
            raise ValueError(f"no transition from {self.phase} to {phase} (valid: {sorted(TRANSITIONS[self.phase])})")
        self.phase = phase
        self.failure = failure or self.failure
        self.engine_pid = engine_pid
        self.restarts += phase is JobPhase.RESTARTING
        if phase is JobPhase.LOADING:
            self._loading_at = time.monotonic()
        if phase is JobPhase.READY:
            self.ready_at = self.ready_at or time.time()
            self.load_s = round(time.monotonic() - self._loading_at, 3)

    def progress(self) -> JobProgress:
        staging = self.stage.text if self.phase in (JobPhase.STARTING, JobPhase.LOADING) else None
        return JobProgress(
            phase=self.phase,
            reason=self.failure.reason if self.failure else None,
            message=self.failure.message if self.failure else staging,
            restarts=self.restarts,
            engine_pid=self.engine_pid,
            ready_at=self.ready_at,
            load_s=self.load_s,
            stage_s=self.stage.stage_s,
            stage_bytes=None if self.stage.stage_s is None else self.stage.copied,
        )
