"""The GPU time that experts have used, in `gpu_hours.json`. The leading control loop writes it; the router, for its
metrics and its dashboard, and the command `status` read it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from hpc_router.errors import RegistryError

HOUR_S = 3600.0


class GpuState(StrEnum):
    """What a replica does while it holds its GPUs."""

    STARTING = "starting"  # its job runs and it is not ready yet
    BUSY = "busy"  # ready, with requests in flight
    IDLE = "idle"  # ready, without a request
    DRAINING = "draining"  # finishes its requests


@dataclass(frozen=True, slots=True)
class ExpertUsage:
    """The usage of one expert since the first launch of the run. `gpu_s`: GPU seconds by state. `tokens`: generated
    tokens, as the engines count them; None if no engine has counted any. `last_request_at`: Unix seconds."""

    gpu_s: Mapping[str, float] = field(default_factory=dict)
    tokens: int | None = None
    last_request_at: float | None = None

    def plus(self, gpus: Mapping[GpuState, int], seconds: float) -> "ExpertUsage":
        """Returns the usage after another `seconds` seconds, in which the expert held `gpus` GPUs in each state."""
        gpu_s = {str(state): spent for state, spent in self.gpu_s.items()}
        for state, count in gpus.items():
            gpu_s[state] = gpu_s.get(state, 0.0) + count * seconds
        return replace(self, gpu_s=gpu_s)

    def hours(self, *states: GpuState) -> float:
        """Returns the GPU hours in the given states; without an argument, in all states."""
        return sum(self.gpu_s.get(state, 0.0) for state in states or GpuState) / HOUR_S

    @property
    def tokens_per_gpu_hour(self) -> float | None:
        """Returns the generated tokens divided by the GPU hours in all states; None without tokens or hours."""
        hours = self.hours()
        return None if self.tokens is None or not hours else self.tokens / hours

    def to_json(self, now: float) -> dict[str, Any]:
        """Returns what `status` and the dashboard show: GPU hours by state, the share of them in which replicas were
        ready without a request (None without hours), generated tokens, the time of the last request, and the seconds
        since then. `now`: Unix seconds."""
        last_at, per_hour, hours = self.last_request_at, self.tokens_per_gpu_hour, self.hours()
        return {
            "last_request_at": last_at,
            "idle_s": None if last_at is None else round(max(0.0, now - last_at), 1),
            "gpu_hours": {state.value: round(self.hours(state), 4) for state in GpuState},
            "idle_share": round(self.hours(GpuState.IDLE) / hours, 4) if hours else None,
            "tokens": self.tokens,
            "tokens_per_gpu_hour": None if per_hour is None else round(per_hour, 1),
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """The content of `gpu_hours.json`. `at`: Unix time up to which the usage is counted. `seen`: by replica, the number
    of tokens that its engine had counted at that time; only a later increase is added."""

    at: float
    experts: Mapping[str, ExpertUsage] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        experts = {name: asdict(usage) for name, usage in self.experts.items()}
        return {"at": round(self.at, 3), "experts": experts, "seen": dict(self.seen)}


def parse_usage(value: Mapping[str, Any]) -> Usage:
    """Parses the content of `gpu_hours.json`. Raises RegistryError if it is not valid."""
    try:
        experts = {
            str(name): ExpertUsage(
                {str(state): float(seconds) for state, seconds in entry["gpu_s"].items()},
                None if entry["tokens"] is None else int(entry["tokens"]),
                None if entry["last_request_at"] is None else float(entry["last_request_at"]),
            )
            for name, entry in value["experts"].items()
        }
        return Usage(float(value["at"]), experts, {str(name): int(count) for name, count in value["seen"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RegistryError(f"gpu_hours.json is damaged: {error!r}") from error
