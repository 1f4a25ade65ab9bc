"""An expert in a prediction: its replicas from submission to end, its queue, and its number of replicas.

The queue is first come, first served. A request goes to the ready replica with the fewest requests in flight, or with
`router.pin_bound=null` to the better of two drawn at random, as in the router. Whether an expert gets more or fewer
replicas is decided by `control_loop.elasticity`.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from hpc_router.bench.what_if.calendar import Calendar
from hpc_router.bench.what_if.engines import PredictedEngine, PredictedRequest, make_engine
from hpc_router.bench.what_if.service import ExpertService
from hpc_router.cluster.control_loop.elasticity import Demand, ElasticState, Expert, Supply, decide
from hpc_router.router.replicas.admission import DepartureRate
from hpc_router.router.replicas.balancing import power_of_two_choices


@dataclass(slots=True, eq=False)
class PredictedReplica:
    """One job. `load`: requests in flight. `gpu_from_s`: when it got its GPUs; None while it is queued. `busy_s`: time
    with a request in flight until now, or until `busy_from_s` if it has one."""

    engine: PredictedEngine = field(init=False)
    load: int = 0
    last_used: int = 0
    ready: bool = False
    draining: bool = False
    gpu_from_s: float | None = None
    busy_s: float = 0.0
    busy_from_s: float = 0.0


@dataclass(slots=True)
class GpuBudget:
    """The GPUs that all jobs may have together. `limit`: None without a limit."""

    limit: int | None
    used: int = 0

    def fits(self, gpus: int) -> bool:
        return self.limit is None or self.used + gpus <= self.limit


class PredictedExpert:
    """One expert with jobs of its own, and its adapters. `ended`: called for each request at its last token.
    `replica_s`, `busy_s`: time of ended replicas, from the start of their jobs, and that with requests in flight."""

    def __init__(
        self,
        service: ExpertService,
        calendar: Calendar,
        random: Random,
        budget: GpuBudget,
        *,
        two_choices: bool,
        retry_s: float,
        ended: Callable[[PredictedRequest], None],
    ) -> None:
        self.service = service
        self._calendar, self._random, self._budget, self._two_choices = calendar, random, budget, two_choices
        self._retry_s, self._ended = retry_s, ended
        self.slots: list[PredictedReplica | None] = []
        self.draining: set[PredictedReplica] = set()
        self.ready: list[PredictedReplica] = []  # those that take requests
        self.in_flight = self.waiting = 0
        self.last_request_s: float | None = None
        self._line: deque[PredictedRequest] = deque()
        self._rate = DepartureRate()
        self._uses = 0
        self.replica_s = self.busy_s = 0.0
        self.state: ElasticState | None = None
        if service.elastic is not None:
            self.state = ElasticState(service.replicas, 0.0, "replicas at the beginning")
        self.set_replicas(service.replicas, at_once=True)

    # --- requests

    def submit(self, request: PredictedRequest) -> None:
        """Gives the request to a replica, or lets it wait."""
        if not self.waiting and self._send(request):
            return
        if not self.waiting:
            self._rate.began(self._calendar.now_s)
        self._line.append(request)
        self.waiting += 1

    def refuse(self, request: PredictedRequest) -> None:
        """Takes a waiting request out of the queue."""
        request.refused = True
        self.waiting -= 1

    def _send(self, request: PredictedRequest) -> bool:
        """Gives the request to a replica with a free place; returns False if there is none."""
        most, capacity = self.service.max_in_flight, self.service.capacity
        if not self.ready or (most is not None and self.in_flight >= most):
            return False
        if self._two_choices and len(self.ready) > 1:
            chosen = power_of_two_choices(self.ready, fits=lambda one: one.load < capacity, random=self._random)
        else:
            chosen = min(self.ready, key=lambda one: (one.load, one.last_used))
        if chosen is None or chosen.load >= capacity:
            return False
        now_s = self._calendar.now_s
        self._uses += 1
        chosen.last_used = self._uses
        if not chosen.load:
            chosen.busy_from_s = now_s
        chosen.load += 1
        self.in_flight += 1
        request.sent_s = now_s
        chosen.engine.submit(request)
        return True

    def _send_waiting(self) -> None:
        while self._line:
            request = self._line[0]
            if not request.refused:
                if not self._send(request):
                    return
                self.waiting -= 1
                self._rate.left(self._calendar.now_s)
            self._line.popleft()

    def _done(self, replica: PredictedReplica, request: PredictedRequest) -> None:
        replica.load -= 1
        self.in_flight -= 1
        if not replica.load:
            replica.busy_s += self._calendar.now_s - replica.busy_from_s
            if replica.draining:
                self._end(replica)
        self._send_waiting()
        self._ended(request)

    # --- replicas

    def set_replicas(self, count: int, *, at_once: bool = False) -> None:
        """Submits the jobs that are missing, and drains those of surplus slots. `at_once`: the new ones are ready."""
        self.slots.extend([None] * (count - len(self.slots)))
        for number in reversed(range(count, len(self.slots))):
            replica = self.slots[number]
            if replica is not None:
                self._drain(replica)
            del self.slots[number]
        for number, replica in enumerate(self.slots):
            if replica is None:
                self._submit_job(number, at_once=at_once)

    def _submit_job(self, number: int, *, at_once: bool) -> None:
        replica = self.slots[number] = PredictedReplica()
        replica.engine = make_engine(self.service.config, self._calendar, partial(self._done, replica))
        if at_once:
            replica.gpu_from_s = self._calendar.now_s
            self._budget.used += self.service.gpus
            self._make_ready(replica)
        else:
            self._calendar.at(self._calendar.now_s + self.service.queue_s, self._start, replica)

    def _start(self, replica: PredictedReplica) -> None:
        """Starts a queued job when GPUs are free within the limit."""
        if replica.draining:
            return
        now_s = self._calendar.now_s
        if not self._budget.fits(self.service.gpus):
            self._calendar.at(now_s + self._retry_s, self._start, replica)
            return
        replica.gpu_from_s = now_s
        self._budget.used += self.service.gpus
        self._calendar.at(now_s + self.service.load_s, self._make_ready, replica)

    def _make_ready(self, replica: PredictedReplica) -> None:
        if not replica.draining:
            replica.ready = True
            self.ready.append(replica)
            self._send_waiting()

    def _drain(self, replica: PredictedReplica) -> None:
        replica.draining = True
        if replica in self.ready:
            self.ready.remove(replica)
        if replica.load:
            self.draining.add(replica)
        else:
            self._end(replica)

    def _end(self, replica: PredictedReplica) -> None:
        self.draining.discard(replica)
        if replica.gpu_from_s is not None:
            self._budget.used -= self.service.gpus
            self.replica_s += self._calendar.now_s - replica.gpu_from_s
            self.busy_s += replica.busy_s

    def close(self) -> None:
        """Counts the time of the replicas that still exist at the end of the prediction."""
        now_s = self._calendar.now_s
        for replica in [*(one for one in self.slots if one is not None), *self.draining]:
            if replica.load:
                replica.busy_s += now_s - replica.busy_from_s
            if replica.gpu_from_s is not None:
                self.replica_s += now_s - replica.gpu_from_s
                self.busy_s += replica.busy_s

    @property
    def with_gpus(self) -> int:
        """Number of replicas whose jobs run now."""
        slots = sum(one is not None and one.gpu_from_s is not None for one in self.slots)
        return slots + len(self.draining)

    def elastic_input(self) -> Expert | None:
        """Returns what the decision on the number of replicas is made from; None for a fixed number."""
        service, now_s = self.service, self._calendar.now_s
        if service.elastic is None or self.state is None:
            return None
        wait_s = self._rate.wait_s(self.waiting, now_s) if self.waiting else 0.0
        ready = tuple(one is not None and one.ready for one in self.slots)
        demand = Demand(self.in_flight, self.waiting, wait_s, self.last_request_s)
        supply = Supply(ready, until_ready_s=service.queue_s + service.load_s)
        return Expert(service.elastic, self.state, demand, supply)


def scale(experts: Mapping[str, PredictedExpert], budget: GpuBudget, now_s: float) -> dict[str, ElasticState]:
    """Decides the number of replicas of all elastic experts, as the control loop does, and applies it. Returns the
    states that changed."""
    inputs = {name: made for name, expert in experts.items() if (made := expert.elastic_input()) is not None}
    fixed = sum(expert.service.replicas * expert.service.gpus for name, expert in experts.items() if name not in inputs)
    decided = decide(inputs, now_s, free_gpus=None if budget.limit is None else budget.limit - fixed)
    changed = {}
    for name, state in decided.items():
        expert, before = experts[name], inputs[name].state
        expert.state = replace(state)
        if state.replicas != before.replicas:
            changed[name] = state
            expert.set_replicas(state.replicas)
    return changed
