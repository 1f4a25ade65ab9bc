"""The ranks of an engine that spans nodes, as rank 0 sees them. Pure decisions: time comes in as an argument.

An attempt begins when every other rank has reported in and runs nothing; each has a port of its own, so a clash costs
one attempt. It is over as soon as any rank falls silent, is another process than before, or reports that its engine
ended: no rank of a broken engine serves anything. Between attempts the ranks are told to wait, at the end to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from hpc_router.expert.engines import EngineFailure
from hpc_router.net.protocol import Action, RankOrder, RankReport, RankState
from hpc_router.state.job_records import FailureReason

SILENCE_BEATS: Final = 5
"""A rank that is not heard of for so many beats (`cluster.beat_s`, so 10 s) is lost, and so is rank 0 to the others."""
ASSEMBLE_BEATS: Final = 60
"""The ranks of a job start within so many beats of each other, whatever their nodes' file systems do."""
RETURN_BEATS: Final = 15
"""A lost rank that is not back after so many beats will not come."""
FAREWELL_BEATS: Final = 2
"""At the end a rank may take so long to ask once more; Slurm gives a job's processes little time to end."""
_VAGUE: Final = frozenset({FailureReason.CRASHED, FailureReason.CUDA})
"""What an engine says that has lost a peer: that it crashed, or on GPUs that NCCL failed."""


@dataclass(slots=True)
class _Heard:
    at: float
    report: RankReport
    told: Action


@dataclass(slots=True)
class RankGroup:
    """`nodes`: how many ranks there are, rank 0 among them."""

    nodes: int
    silence_s: float
    attempt: int = 0
    stopping: bool = False
    _meeting: tuple[str, int] | None = None
    _heard: dict[int, _Heard] = field(default_factory=dict)
    _taking_part: dict[int, str] = field(default_factory=dict)

    def heard(self, report: RankReport, *, now: float) -> RankOrder:
        """What this rank is to do. Raises ValueError for a rank that cannot be."""
        if not 1 <= report.rank < self.nodes:
            raise ValueError(f"rank {report.rank} reports; there are 1 to {self.nodes - 1}")
        order = self._order(report)
        self._heard[report.rank] = _Heard(now, report, order.action)
        return order

    def _order(self, report: RankReport) -> RankOrder:
        if self.stopping:
            return RankOrder(Action.STOP)
        if self._meeting is None or self._taking_part.get(report.rank) != report.instance:
            return RankOrder(Action.WAIT)
        return RankOrder(Action.RUN, self.attempt, *self._meeting)

    def absent(self, *, now: float) -> Sequence[int]:
        """The ranks that cannot take part in a new attempt now."""
        return [
            rank
            for rank in range(1, self.nodes)
            if self._silent(rank, now=now) or self._heard[rank].report.state is RankState.RUNNING
        ]

    def begin(self, address: str, port: int) -> None:
        """The next attempt, whose ranks meet there."""
        self.attempt += 1
        self._meeting = (address, port)
        self._taking_part = {rank: heard.report.instance for rank, heard in self._heard.items()}

    def end(self) -> None:
        self._meeting = None

    def stop(self) -> None:
        self._meeting = None
        self.stopping = True

    def trouble(self, *, now: float) -> EngineFailure | None:
        """Why this attempt is lost, as far as the other ranks show it."""
        for rank in range(1, self.nodes):
            if self._silent(rank, now=now):
                return EngineFailure(
                    FailureReason.RANK_LOST, f"{self._name(rank)} has not been heard of for {self.silence_s:g} s"
                )
            report = self._heard[rank].report
            if report.instance != self._taking_part.get(rank):
                return EngineFailure(FailureReason.RANK_LOST, f"{self._name(rank)} was restarted")
            if report.attempt == self.attempt and report.state is RankState.ENDED:
                return EngineFailure(_reason(report.reason), f"{self._name(rank)}: {report.message}")
        return None

    def cause(self, own: EngineFailure, *, ended_at: float, now: float) -> EngineFailure | None:
        """Why an attempt ended in which rank 0's own engine did: when that cannot say, another rank may know.

        None: some rank has not yet spoken since.
        """
        if own.reason not in _VAGUE:
            return own
        other = self.trouble(now=now)
        if other is not None and other.reason not in _VAGUE:
            return other
        return own if all(heard.at > ended_at for heard in self._heard.values()) else None

    def dismissed(self, *, now: float) -> bool:
        """Every rank has been told to stop, or lives no more."""
        return all(h.told is Action.STOP or self._silent(rank, now=now) for rank, h in self._heard.items())

    def deserter(self) -> EngineFailure | None:
        """A rank that was gone before it was told to stop."""
        for rank, heard in self._heard.items():
            if heard.told is not Action.STOP:
                return EngineFailure(FailureReason.RANK_LOST, f"{self._name(rank)} had gone before it was told to stop")
        return None

    def _silent(self, rank: int, *, now: float) -> bool:
        return rank not in self._heard or now - self._heard[rank].at >= self.silence_s

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._heard[rank].report.node}" if rank in self._heard else f"rank {rank}"

    def missing(self, *, now: float, waited_s: float) -> EngineFailure:
        """Why there can be no further attempt."""
        ranks = self.absent(now=now)
        which = ", ".join(self._name(rank) for rank in ranks)
        return EngineFailure(FailureReason.RANK_LOST, f"{which} did not report in within {waited_s:g} s")


def _reason(name: str | None) -> FailureReason:
    """Of another version's agent, perhaps."""
    return FailureReason(name) if name in list(FailureReason) else FailureReason.CRASHED
