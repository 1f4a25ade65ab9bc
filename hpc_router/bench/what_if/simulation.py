"""The simulation: users send requests, a policy chooses their expert, and the figures are collected."""

from array import array
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from statistics import median
from typing import Final

from hpc_router.bench.conversations import draw_length
from hpc_router.bench.figures import Percentiles
from hpc_router.bench.what_if.calendar import Calendar
from hpc_router.bench.what_if.demand import UserDemand
from hpc_router.bench.what_if.engines import PredictedRequest
from hpc_router.bench.what_if.experts import GpuBudget, PredictedExpert, scale
from hpc_router.bench.what_if.service import Service, check_shares
from hpc_router.routing.policy import Policy, build_policy

STEADY_S: Final = 1200.0
"""Simulated seconds if nothing changes in the whole period: neither the number of users nor that of replicas."""
STEADY_PAUSES: Final = 20
"""Minimum of that time in mean pauses of a user."""
BINS: Final = 160
"""Number of points of each line of the plot."""
RETRY_S: Final = 0.1
"""Seconds that a user pauses after a refusal, in addition to the usual pause; as the load generator does."""


@dataclass(slots=True)
class ExpertFigures:
    """The requests of one expert. Lists of seconds: `ttft_s`, `wait_s` (for a replica), `e2e_s`."""

    requests: int = 0
    refused: int = 0
    cold_starts: int = 0
    tokens: int = 0
    ttft_s: "array[float]" = field(default_factory=lambda: array("d"))
    wait_s: "array[float]" = field(default_factory=lambda: array("d"))
    e2e_s: "array[float]" = field(default_factory=lambda: array("d"))


@dataclass(frozen=True, slots=True)
class Scaled:
    """A change of the number of replicas of an expert, with the reason that the control loop would give."""

    at_s: float
    expert: str
    replicas: int
    reason: str


@dataclass(frozen=True, slots=True)
class Series:
    """One point of the lines of the plot. `ttft_s`: median of the first tokens since the point before; None without
    any."""

    at_s: float
    users: int
    in_flight: int
    waiting: int
    replicas: int
    gpus: int
    ttft_s: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one expert, or of all. GPU hours are those of the whole period; `idle_share`: share of the
    replicas' time in which they had no request in flight."""

    requests: int
    refused: int
    cold_starts: int
    requests_per_s: float
    tokens_per_s: float
    ttft_s: Percentiles | None
    wait_s: Percentiles | None
    e2e_s: Percentiles | None
    gpu_hours: float
    replica_hours: float
    idle_share: float | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """The result. `simulated_s`: length of the simulated part of the period; the rest is the same. `experts`: the
    figures of each expert, adapters too."""

    service: Service
    demand: UserDemand
    simulated_s: float
    total: Summary
    experts: Mapping[str, Summary]
    scaled: tuple[Scaled, ...]
    series: tuple[Series, ...]


class Simulation:
    """One prediction; `run` may be called once."""

    def __init__(self, service: Service, demand: UserDemand) -> None:
        check_shares(demand.shares, service)
        self._service, self._demand = service, demand
        self._calendar = Calendar()
        self._users_random, self._lengths_random, self._route_random, balance_random = (
            Random(f"{demand.seed}:{name}") for name in ("users", "lengths", "routes", "balance")
        )
        self._budget = GpuBudget(service.max_gpus)
        self.experts = {
            name: PredictedExpert(
                one,
                self._calendar,
                balance_random,
                self._budget,
                two_choices=service.pin_bound is None,
                retry_s=service.reconcile_s,
                ended=self._ended,
            )
            for name, one in service.experts.items()
        }
        self._figures = {name: ExpertFigures() for name in service.hosts}
        shares = demand.shares or dict.fromkeys(service.hosts, 1.0)
        self._names = list(shares)
        self._cumulated = list(accumulate(shares.values()))
        self._policy = _load_policy(service) if not demand.shares else None
        self._users = self._wanted_users = 0
        self._in_router = 0
        self._recent: list[float] = []
        self._series: list[Series] = []
        self._scaled: list[Scaled] = []

    def run(self) -> Prediction:
        service, demand, calendar = self._service, self._demand, self._calendar
        elastic = any(one.elastic is not None for one in service.experts.values())
        simulated_s = demand.for_s
        if demand.is_constant and not elastic:
            simulated_s = min(simulated_s, max(STEADY_S, STEADY_PAUSES * demand.think_s))
        for at_s, count in demand.users:
            calendar.at(at_s, self._set_users, count)
        for number in range(BINS + 1):
            calendar.at(simulated_s * number / BINS, self._sample)
        if elastic:
            calendar.at(0.0, self._reconcile)
        calendar.run(simulated_s)
        for expert in self.experts.values():
            expert.close()
        factor = demand.for_s / simulated_s
        summaries = {name: self._summary([name], simulated_s, factor) for name in service.hosts}
        total = self._summary(list(service.hosts), simulated_s, factor)
        return Prediction(service, demand, simulated_s, total, summaries, tuple(self._scaled), tuple(self._series))

    # --- users

    def _set_users(self, count: int) -> None:
        self._wanted_users = count
        while self._users < count:
            self._users += 1
            self._pause()

    def _pause(self, more_s: float = 0.0) -> None:
        mean_s = self._demand.think_s
        pause_s = self._users_random.expovariate(1 / mean_s) if mean_s else 0.0
        self._calendar.at(self._calendar.now_s + pause_s + more_s, self._request)

    def _request(self) -> None:
        """Sends the next request of one user, or ends the user if there are more than wanted."""
        if self._users > self._wanted_users:
            self._users -= 1
            return
        demand, source = self._demand, self._lengths_random
        prompt, answer = draw_length(source, demand.prompt_tokens), draw_length(source, demand.answer_tokens)
        name = self._choose()
        request = PredictedRequest(name, self._calendar.now_s, prompt, answer)
        self._figures[name].requests += 1
        self._route(request)

    def _choose(self) -> str:
        """Returns the expert of the next request."""
        if self._policy is not None:
            ready = {name: self.experts[host].in_flight for name, host in self._service.hosts.items()
                     if self.experts[host].ready}  # fmt: skip
            chosen = self._policy.select("", ready=ready).expert if ready else None
            if chosen is not None:
                return chosen
        drawn = self._route_random.random() * self._cumulated[-1]
        return self._names[min(bisect(self._cumulated, drawn), len(self._names) - 1)]

    def _route(self, request: PredictedRequest) -> None:
        service = self._service
        expert = self.experts[service.hosts[request.expert]]
        expert.last_request_s = self._calendar.now_s
        figures = self._figures[request.expert]
        if not expert.ready:
            figures.cold_starts += 1
            if service.cold_start == "fallback":
                expert = self._other_expert(expert)
            never = not expert.slots and expert.service.elastic is None
            if never or (service.cold_start == "fail" and not expert.ready):
                self._refuse(request)
                return
        if expert.waiting >= service.max_waiting or self._in_router >= service.max_in_flight:
            self._refuse(request)
            return
        self._in_router += 1
        expert.submit(request)
        if request.sent_s is None:
            self._calendar.at(self._calendar.now_s + service.queue_timeout_s, self._time_out, request, expert)

    def _other_expert(self, expert: PredictedExpert) -> PredictedExpert:
        """Returns the expert that serves a prompt instead of one without a ready replica: the fallback, or any other
        that is ready; `expert` itself if there is none."""
        fallback = self._service.fallback
        names = [*([] if fallback is None else [self._service.hosts[fallback]]), *self.experts]
        return next((self.experts[name] for name in names if self.experts[name].ready), expert)

    def _time_out(self, request: PredictedRequest, expert: PredictedExpert) -> None:
        """Refuses a request that has waited too long. Time without a ready replica does not count."""
        if request.sent_s is not None:
            return
        if not expert.ready:
            self._calendar.at(self._calendar.now_s + self._service.queue_timeout_s, self._time_out, request, expert)
            return
        expert.refuse(request)
        self._in_router -= 1
        self._refuse(request)

    def _refuse(self, request: PredictedRequest) -> None:
        self._figures[request.expert].refused += 1
        self._pause(RETRY_S)

    def _ended(self, request: PredictedRequest) -> None:
        assert request.sent_s is not None
        self._in_router -= 1
        figures = self._figures[request.expert]
        figures.tokens += request.answer_tokens
        ttft_s = request.first_s - request.arrived_s
        figures.ttft_s.append(ttft_s)
        figures.wait_s.append(request.sent_s - request.arrived_s)
        figures.e2e_s.append(self._calendar.now_s - request.arrived_s)
        self._recent.append(ttft_s)
        self._pause()

    # --- control loop and figures

    def _reconcile(self) -> None:
        now_s = self._calendar.now_s
        for name, state in scale(self.experts, self._budget, now_s).items():
            self._scaled.append(Scaled(now_s, name, state.replicas, state.reason))
        self._calendar.at(now_s + self._service.reconcile_s, self._reconcile)

    def _sample(self) -> None:
        experts = self.experts.values()
        self._series.append(
            Series(
                self._calendar.now_s,
                self._users,
                sum(one.in_flight for one in experts),
                sum(one.waiting for one in experts),
                sum(one.with_gpus for one in experts),
                sum(one.with_gpus * one.service.gpus for one in experts),
                median(self._recent) if self._recent else None,
            )
        )
        self._recent = []

    def _summary(self, names: list[str], simulated_s: float, factor: float) -> Summary:
        """Returns the figures of these experts. `factor`: length of the whole period, relative to the simulated one."""
        found = [self._figures[name] for name in names]
        hosts = [self.experts[name] for name in names if name in self.experts]
        replica_s = sum(one.replica_s for one in hosts)
        gpu_s = sum(one.replica_s * one.service.gpus * (1 + one.service.handover_share) for one in hosts)
        ended = sum(len(one.e2e_s) for one in found)
        return Summary(
            requests=round(sum(one.requests for one in found) * factor),
            refused=round(sum(one.refused for one in found) * factor),
            cold_starts=round(sum(one.cold_starts for one in found) * factor),
            requests_per_s=ended / simulated_s,
            tokens_per_s=sum(one.tokens for one in found) / simulated_s,
            ttft_s=Percentiles.of(value for one in found for value in one.ttft_s),
            wait_s=Percentiles.of(value for one in found for value in one.wait_s),
            e2e_s=Percentiles.of(value for one in found for value in one.e2e_s),
            gpu_hours=gpu_s * factor / 3600,
            replica_hours=replica_s * factor / 3600,
            idle_share=1 - sum(one.busy_s for one in hosts) / replica_s if replica_s else None,
        )


def _load_policy(service: Service) -> Policy | None:
    """Returns the policy if it chooses by the load of the experts; None if the prompts decide."""
    if service.policy not in ("round_robin", "least_in_flight"):
        return None
    return build_policy(kind=service.policy, fallback=service.fallback)
