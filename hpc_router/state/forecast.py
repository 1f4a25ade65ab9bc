"""Reads `forecast.json`, which says when an expert without a ready replica is expected to have one."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from hpc_router.state.job_records import JobPhase
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import StampedFile

SCALED_TO_ZERO: Final = "ScaledToZero"
"""Reason in `forecast.json` for an expert that has no replica because nobody used it, and gets one on demand."""


NO_GPUS: Final = "MaxGpus"
"""Reason in `forecast.json` for an expert that gets no replica because the others have `cluster.max_gpus` GPUs."""

FAILED: Final = "Failed"
"""Reason in `forecast.json` for an expert that gets no replica because all its slots have failed for good."""


ON_DEMAND: Final = "scaled to zero, starts on demand"


@dataclass(frozen=True, slots=True)
class StartForecast:
    """The expected start of an expert's next replica. `state`: what the start waits for, as text. `ready_at`: when the
    replica is expected to be ready, in Unix seconds; None if unknown. `until_ready_s`: for an expert that is scaled to
    zero, the expected seconds from the first request to a ready replica. `hopeless`: whether no replica will start."""

    state: str
    ready_at: float | None = None
    until_ready_s: float | None = None
    hopeless: bool = False

    def expected_ready_at(self, now: float) -> float | None:
        """Returns when a replica is expected to be ready, in Unix seconds, if a request comes at `now` (Unix seconds);
        None if that is unknown."""
        if self.ready_at is not None or self.until_ready_s is None:
            return self.ready_at
        return now + self.until_ready_s

    def text(self, now: float) -> str:
        """Returns the state and the expected time as a text: `queued in Slurm (Resources), expected at 09:40`. The time
        is local, has a date if it is not on the day of `now` (Unix seconds), and is left out if it has passed."""
        ready_at = self.expected_ready_at(now)
        if ready_at is None or ready_at <= now:
            return self.state
        then = datetime.fromtimestamp(ready_at)
        days = "" if then.date() == datetime.fromtimestamp(now).date() else f"{then:%Y-%m-%d} "
        return f"{self.state}, expected at {days}{then:%H:%M}"


class ForecastReader:
    """Reads `forecast.json`. `content`: the JSON object at the last `read`, empty without a valid file. `experts`: its
    forecasts by expert; only experts without a ready replica have one."""

    def __init__(self, run: RunDir) -> None:
        self._file = StampedFile[Mapping[str, Any]](run.forecast_json, lambda content: content)
        self.content: Mapping[str, Any] = {}
        self.experts: Mapping[str, StartForecast] = {}

    def read(self) -> None:
        """Reads `forecast.json` if it has changed. Raises OSError if the file system fails."""
        content = self._file.read() or {}
        if content is not self.content:
            self.content, self.experts = content, _forecasts(content)


def _forecasts(content: Mapping[str, Any]) -> dict[str, StartForecast]:
    """Returns the valid forecasts in the file's content, by expert."""
    experts = content.get("experts")
    if not isinstance(experts, dict):
        return {}
    return {name: _forecast(entry) for name, entry in experts.items() if isinstance(entry, dict)}


def _forecast(entry: Mapping[str, Any]) -> StartForecast:
    ready_at, until_ready_s = entry.get("ready_at"), entry.get("until_ready_s")
    return StartForecast(
        _state(entry.get("reason")),
        ready_at if isinstance(ready_at, int | float) else None,
        until_ready_s if isinstance(until_ready_s, int | float) else None,
        hopeless=entry.get("reason") == FAILED,
    )


def _state(reason: object) -> str:
    """Returns the text for a `reason` in `forecast.json`: a phase of the job, or Slurm's reason why it waits."""
    if not isinstance(reason, str) or reason in (JobPhase.STARTING, "None"):
        return "starting"
    if reason == SCALED_TO_ZERO:
        return ON_DEMAND
    if reason == FAILED:
        return "failed"
    if reason == NO_GPUS:
        return "waits for GPUs within cluster.max_gpus"
    if reason in list(JobPhase):
        return f"starting ({reason})"
    return f"queued in Slurm ({reason})"
