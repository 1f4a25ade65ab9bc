"""The ranks of an engine on several nodes, as seen by rank 0. Decisions only: no I/O, and time is an argument.

An attempt begins when every other rank has reported that it runs no engine. Each attempt uses another port, so that a
port that is in use makes only one attempt fail. The attempt ends as soon as any rank is silent, was restarted, or
reports that its engine ended, because an engine without one of its ranks cannot serve. Between attempts the ranks get
the order to wait, and at the end the order to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from hpc_router.expert.engines import EngineFailure
from hpc_router.net.protocol import Action, RankOrder, RankReport, RankState
from hpc_router.state.job_records import FailureReason

SILENCE_BEATS: Final = 5
"""Number of beats (`cluster.beat_s`, 2 s by default) without a report after which a rank is lost. Followers use the
same limit for rank 0."""
ASSEMBLE_BEATS: Final = 60
"""Time limit in beats for the start of all ranks of a job. It allows for slow file systems on some nodes."""
RETURN_BEATS: Final = 15
"""Time limit in beats for a lost rank to report again."""
STOP_BEATS: Final = 2
"""Time limit in beats in which the ranks must fetch the order to stop. Slurm gives processes little time to exit."""
_UNSPECIFIC: Final = frozenset({FailureReason.CRASHED, FailureReason.CUDA})
"""Unspecific failure reasons: they may be a consequence of the loss of another rank (a crash, or an error of NCCL on a
GPU)."""


@dataclass(slots=True)
class _LastReport:
    """The last report of a rank, when it arrived, and the order that the rank got."""

    at: float
    report: RankReport
    action: Action


@dataclass(slots=True)
class RankGroup:
    """The state of all ranks. `nodes`: number of ranks, including rank 0."""

    nodes: int
    silence_s: float
    attempt: int = 0
    stopping: bool = False
    _rendezvous: tuple[str, int] | None = None
    _reports: dict[int, _LastReport] = field(default_factory=dict)
    _members: dict[int, str] = field(default_factory=dict)

    def on_report(self, report: RankReport, *, now: float) -> RankOrder:
        """Records a report and returns the order for its rank. Raises ValueError for an unknown rank."""
        if not 1 <= report.rank < self.nodes:
            raise ValueError(f"rank {report.rank} reports; there are 1 to {self.nodes - 1}")
        order = self._order(report)
        self._reports[report.rank] = _LastReport(now, report, order.action)
        return order

    def _order(self, report: RankReport) -> RankOrder:
        if self.stopping:
            return RankOrder(Action.STOP)
        if self._rendezvous is None or self._members.get(report.rank) != report.instance:
            return RankOrder(Action.WAIT)
        return RankOrder(Action.RUN, self.attempt, *self._rendezvous)

    def unavailable(self, *, now: float) -> Sequence[int]:
        """Returns the ranks that cannot take part in a new attempt now."""
        return [
            rank
            for rank in range(1, self.nodes)
            if self._is_silent(rank, now=now) or self._reports[rank].report.state is RankState.RUNNING
        ]

    def begin(self, address: str, port: int) -> None:
        """Begins the next attempt. `address`, `port`: where its ranks connect to each other."""
        self.attempt += 1
        self._rendezvous = (address, port)
        self._members = {rank: last.report.instance for rank, last in self._reports.items()}

    def end(self) -> None:
        self._rendezvous = None

    def stop(self) -> None:
        self._rendezvous = None
        self.stopping = True

    def find_failure(self, *, now: float) -> EngineFailure | None:
        """Returns the reason why this attempt has failed, according to the other ranks; None if it has not failed."""
        for rank in range(1, self.nodes):
            if self._is_silent(rank, now=now):
                return EngineFailure(
                    FailureReason.RANK_LOST, f"{self._name(rank)} sent no report for {self.silence_s:g} s"
                )
            report = self._reports[rank].report
            if report.instance != self._members.get(rank):
                return EngineFailure(FailureReason.RANK_LOST, f"{self._name(rank)} was restarted")
            if report.attempt == self.attempt and report.state is RankState.ENDED:
                return EngineFailure(_reason(report.reason), f"{self._name(rank)}: {report.message}")
        return None

    def find_cause(self, own: EngineFailure, *, ended_at: float, now: float) -> EngineFailure | None:
        """Returns why an attempt ended, after rank 0's engine ended with the failure `own`. If the reason in `own` is
        specific, that is `own`; else the failure of another rank with a specific reason; without one, `own`.

        As long as an unspecific `own` may have a better reason elsewhere, returns None: until all other ranks have
        reported after `ended_at`.
        """
        if own.reason not in _UNSPECIFIC:
            return own
        other = self.find_failure(now=now)
        if other is not None and other.reason not in _UNSPECIFIC:
            return other
        return own if all(last.at > ended_at for last in self._reports.values()) else None

    def all_stopped(self, *, now: float) -> bool:
        """Returns whether every rank has received the order to stop, or is silent."""
        return all(last.action is Action.STOP or self._is_silent(rank, now=now) for rank, last in self._reports.items())

    def missing_rank(self) -> EngineFailure | None:
        """Returns a failure that names a rank which was lost before it got the order to stop; None if no rank was."""
        for rank, last in self._reports.items():
            if last.action is not Action.STOP:
                return EngineFailure(
                    FailureReason.RANK_LOST, f"{self._name(rank)} was lost before it got the order to stop"
                )
        return None

    def _is_silent(self, rank: int, *, now: float) -> bool:
        return rank not in self._reports or now - self._reports[rank].at >= self.silence_s

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._reports[rank].report.node}" if rank in self._reports else f"rank {rank}"

    def assembly_failure(self, *, now: float, waited_s: float) -> EngineFailure:
        """Returns a failure that names the ranks that were not available for an attempt within `waited_s` seconds."""
        ranks = self.unavailable(now=now)
        which = ", ".join(self._name(rank) for rank in ranks)
        return EngineFailure(FailureReason.RANK_LOST, f"{which} did not report in within {waited_s:g} s")


def _reason(name: str | None) -> FailureReason:
    """Returns the failure reason with this name. An unknown one, from another version, counts as a crash."""
    return FailureReason(name) if name in list(FailureReason) else FailureReason.CRASHED
