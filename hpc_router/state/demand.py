"""The demand at a router, in `demand/ROUTER.json`. The router's control process writes it. The commands read it, and so
does the control loop, which decides the number of replicas by it.

Each router writes a file of its own. The sum over the live routers is the demand of the run, also while one router
hands over to another.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from hpc_router.state.atomic_files import read_json
from hpc_router.state.run_directory import RunDir


@dataclass(frozen=True, slots=True)
class ExpertDemand:
    """The requests for one expert and its adapters. `in_flight`, `waiting`: number of requests. `wait_s`: expected wait
    of a new request in seconds. `last_request_at`: Unix time of the last request; None if there was none."""

    in_flight: int = 0
    waiting: int = 0
    wait_s: float = 0.0
    last_request_at: float | None = None

    def __add__(self, other: "ExpertDemand") -> "ExpertDemand":
        times = [at for at in (self.last_request_at, other.last_request_at) if at is not None]
        return ExpertDemand(
            self.in_flight + other.in_flight,
            self.waiting + other.waiting,
            max(self.wait_s, other.wait_s),
            max(times, default=None),
        )


@dataclass(frozen=True, slots=True)
class RouterDemand:
    """The demand at one router. `experts`: the demand by expert, without adapters, which count for their host.
    `replicas`: number of requests in flight by replica. `tokens`: by replica, the number of tokens that its engine has
    generated since its start; engines that do not count them are left out."""

    experts: Mapping[str, ExpertDemand] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        experts = {name: asdict(demand) for name, demand in self.experts.items()}
        return {"experts": experts, "replicas": dict(self.replicas), "tokens": dict(self.tokens)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parses the content of a demand file. Raises ValueError if it is not valid."""
        try:
            experts = {str(name): ExpertDemand(**entry) for name, entry in value["experts"].items()}
            replicas = {str(name): int(count) for name, count in value["replicas"].items()}
            return cls(experts, replicas, {str(name): int(count) for name, count in value.get("tokens", {}).items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the demand at a router: {error}") from error


def demand_path(run: RunDir, router: str) -> Path:
    """Returns the path of the demand file of a router."""
    return run.demand / f"{router}.json"


def read_demand(run: RunDir, routers: Iterable[str]) -> RouterDemand | None:
    """Returns the sum of the demand at these routers; None if none of them has a valid file. The routers read the same
    engines, so the largest number of an engine's tokens is its newest."""
    read = [value for router in routers if (value := read_json(demand_path(run, router))) is not None]
    found = []
    for value in read:
        try:
            found.append(RouterDemand.from_json(value))
        except ValueError:
            continue
    if not found:
        return None
    experts: dict[str, ExpertDemand] = {}
    replicas: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for one in found:
        for name, demand in one.experts.items():
            experts[name] = experts.get(name, ExpertDemand()) + demand
        for name, count in one.replicas.items():
            replicas[name] = replicas.get(name, 0) + count
        for name, count in one.tokens.items():
            tokens[name] = max(tokens.get(name, 0), count)
    return RouterDemand(experts, replicas, tokens)
