"""The number of replicas follows the demand: few changes, none too early, and never more GPUs than allowed."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from hpc_router.cluster.control_loop.elasticity import (
    LONG_WAIT_S,
    Demand,
    ElasticPolicy,
    ElasticState,
    Expert,
    Supply,
    decide,
    fits,
)
from hpc_router.cluster.control_loop.handover import Due, HandoverPolicy, schedule
from hpc_router.cluster.control_loop.reconcile import (
    Cancel,
    Desired,
    Drain,
    Kill,
    ReleaseJob,
    Submit,
    held_gpus,
    reconcile,
)
from hpc_router.cluster.control_loop.slots import Attempt, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.state.job_records import Exit, FailureReason, JobPhase, JobProgress, Runner, Stop
from hpc_router.state.registry import State

PASS_S = 2.0
PLACES = 8
PEAK = 3.2
"""Demand at its highest, in replicas."""
TEN_MINUTES_S = 600.0


def policy(**limits: float) -> ElasticPolicy:
    values = {"min_replicas": 0, "max_replicas": 4, "idle_s": 60.0, "places": PLACES} | limits
    return ElasticPolicy(**values)  # type: ignore[arg-type]


@dataclass
class Simulated:
    """One expert whose replicas are ready `ready_s` after the decision. `changes`: time, number before and after."""

    policy: ElasticPolicy
    ready_s: float = 20.0
    now: float = 0.0
    state: ElasticState = field(default_factory=lambda: ElasticState(0, 0.0, "first"))
    ready_at: list[float] = field(default_factory=list)
    last_request_at: float | None = None
    changes: list[tuple[float, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = self.policy.min_replicas
        self.state, self.ready_at = replace(self.state, replicas=first), [0.0] * first

    def step(self, requests: int, *, ends_soon: bool = False, cold: bool = False) -> ElasticState:
        """One pass with that many requests in flight and waiting, each of which takes ten seconds."""
        self.now += PASS_S
        if requests or cold:
            self.last_request_at = self.now
        places = PLACES * sum(at <= self.now for at in self.ready_at)
        waiting = max(0, requests - places)
        wait_s = 10.0 * waiting / max(places, 1) if waiting else 0.0
        demand = Demand(requests - waiting, waiting, wait_s, self.last_request_at)
        supply = Supply(tuple(at <= self.now for at in self.ready_at), until_ready_s=self.ready_s, ends_soon=ends_soon)
        before = self.state.replicas
        self.state = decide({"math": Expert(self.policy, self.state, demand, supply)}, self.now)["math"]
        count = self.state.replicas
        if count != before:
            self.changes.append((self.now, before, count))
        self.ready_at = self.ready_at[:count] + [self.now + self.ready_s] * (count - len(self.ready_at))
        return self.state

    def run(self, load: Callable[[float], float], seconds: float = TEN_MINUTES_S) -> None:
        """`load`: the demand in replicas at a time."""
        until = self.now + seconds
        while self.now < until:
            self.step(int(load(self.now + PASS_S) * PLACES))

    def per_period(self, period_s: float) -> int:
        """The largest number of changes in one period."""
        return max(Counter(int(at // period_s) for at, *_ in self.changes).values(), default=0)


def saw_tooth(period_s: float) -> Callable[[float], float]:
    return lambda at: PEAK * (at % period_s) / period_s


def bursts(period_s: float) -> Callable[[float], float]:
    return lambda at: PEAK if at % period_s < period_s / 5 else 0.0


def night(at: float) -> float:
    return PEAK if 100 < at < 350 else 0.0


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("idle_s", [60.0, 120.0, 300.0])
@pytest.mark.parametrize("period_s", [60.0, 120.0])
@pytest.mark.parametrize("shape", [saw_tooth, bursts])
def test_a_period_of_the_demand_causes_at_most_two_changes(
    shape: Callable[[float], Callable[[float], float]], period_s: float, idle_s: float, least: int
) -> None:
    simulated = Simulated(policy(min_replicas=least, idle_s=idle_s))
    simulated.run(shape(period_s))
    assert 1 <= simulated.per_period(period_s) <= 2
    assert max(after for *_, after in simulated.changes) >= 3, "it followed the demand"


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("idle_s", [30.0, 60.0, 120.0])
def test_a_night_is_one_change_in_the_morning_and_one_in_the_evening(idle_s: float, least: int) -> None:
    simulated = Simulated(policy(min_replicas=least, idle_s=idle_s))
    simulated.run(night)
    [(_, before, up), (evening, _, after)] = simulated.changes
    assert (before, up >= PEAK, after) == (least, True, least)
    assert 350 + idle_s <= evening <= 350 + idle_s + 20


@pytest.mark.parametrize("seed", range(20))
def test_in_twice_idle_s_there_are_at_most_two_changes_besides_starts_and_long_waits(seed: int) -> None:
    draw = random.Random(seed)
    idle_s = draw.choice([30.0, 60.0, 120.0])
    simulated = Simulated(policy(min_replicas=draw.choice([0, 1]), max_replicas=8, idle_s=idle_s))
    level, waits = 0.0, set()
    while simulated.now < 3600:
        level = draw.choice([0.0, 0.3, 1.0, 2.5, 5.0, 7.5]) if draw.random() < 0.03 else level
        before = simulated.state
        simulated.step(int(level * PLACES))
        places = PLACES * sum(at <= simulated.now for at in simulated.ready_at)
        if before is not simulated.state and level * PLACES > places:
            waits.add(simulated.now)
    counted = [at for at, before_count, _ in simulated.changes if before_count and at not in waits]
    assert len(simulated.changes) >= 4
    assert all(c - a >= 2 * idle_s for a, c in zip(counted, counted[2:], strict=False))


@pytest.mark.parametrize("seed", range(5))
def test_the_noise_of_a_steady_demand_is_not_a_trend(seed: int) -> None:
    """Requests that come at random, one in ten seconds, and take ten seconds each: one at a time on average. In six
    hours, several may come at once and cause one replica more for a time."""
    one = Simulated(policy(min_replicas=1, idle_s=300.0), ready_s=120.0)
    drawn, ends = random.Random(seed), list[float]()

    def load(now: float) -> float:
        while not ends or ends[-1] < now:
            ends.append((ends[-1] if ends else 0.0) + drawn.expovariate(0.1))
        return sum(now - 10.0 < at <= now for at in ends) / PLACES

    one.run(load, 6 * 3600.0)
    assert len(one.changes) <= 2


def test_the_first_request_starts_a_replica_even_if_it_was_refused() -> None:
    simulated = Simulated(policy())
    assert simulated.step(0).replicas == 0
    state = simulated.step(0, cold=True)
    assert (state.replicas, state.reason) == (1, "a request came while it had no replica")


def test_many_first_requests_start_as_many_replicas_as_they_need() -> None:
    simulated = Simulated(policy())
    assert simulated.step(3 * PLACES).replicas == 4


def test_an_unused_expert_goes_to_its_minimum_after_idle_s_and_not_before() -> None:
    simulated = Simulated(policy(idle_s=60.0))
    for _ in range(30):
        simulated.step(1)
    began = simulated.now
    while simulated.state.replicas:
        simulated.step(0)
    assert 60 <= simulated.now - began <= 60 + 10
    assert simulated.state.reason == "no request for 60 s"


def test_a_request_every_now_and_then_keeps_the_replica() -> None:
    simulated = Simulated(policy(idle_s=60.0))
    for at in range(600):
        simulated.step(1 if at % 25 == 0 else 0)
    assert [after for *_, after in simulated.changes] == [1]


def test_long_waits_add_a_replica_although_it_has_changed_often() -> None:
    """And only once all replicas are ready, and if more of them help."""
    state = ElasticState(2, 0.0, "", changes=(80.0, 90.0))
    demand = Demand(2 * PLACES, 1, LONG_WAIT_S, 100.0)
    one = Expert(policy(), state, demand, Supply((True, True)))
    [after] = decide({"math": one}, 100.0).values()
    assert (after.replicas, "wait for about 10 s" in after.reason) == (4, True)
    for other in (
        replace(one, supply=Supply((True, False))),
        replace(one, demand=replace(demand, wait_s=LONG_WAIT_S - 0.1)),
        replace(one, demand=replace(demand, waiting=0)),
        replace(one, policy=policy(max_in_flight=12)),
    ):
        assert decide({"math": other}, 100.0)["math"].replicas == 2


def test_a_limit_of_requests_in_flight_limits_the_need() -> None:
    assert fits(policy(max_replicas=100), 1000, 1.0) == 100
    assert fits(policy(max_replicas=100, max_in_flight=16), 1000, 1.0) == 2
    assert [fits(policy(), n, 1.0) for n in (0, 1, 8, 9, 32, 33)] == [0, 1, 1, 2, 4, 4]


def test_it_does_not_go_down_to_replicas_that_are_not_ready() -> None:
    history = tuple((float(at), 0.0) for at in range(100))
    state = ElasticState(2, 0.0, "", history=history, ready_at=0.0)
    one = Expert(policy(min_replicas=1), state, Demand(), Supply((False, True)))
    assert decide({"math": one}, 100.0)["math"].replicas == 2
    failed = replace(one, supply=Supply((False, True), (True, False)))
    assert decide({"math": failed}, 100.0)["math"].replicas == 2, "the one that serves is in the last slot"
    assert decide({"math": replace(failed, policy=policy())}, 100.0)["math"].replicas == 0
    assert decide({"math": replace(one, supply=Supply((True, True)))}, 100.0)["math"].replicas == 1


def test_a_start_is_not_given_up_before_it_could_be_used() -> None:
    """With an `idle_s` shorter than the start, and a client that comes again at the expected time."""
    simulated = Simulated(policy(idle_s=4.0), ready_s=60.0)
    simulated.step(0, cold=True)
    while simulated.state.ready_at is None:
        assert simulated.step(0).replicas == 1
    ready_at = simulated.now
    while simulated.state.replicas:
        simulated.step(0)
    assert 4 <= simulated.now - ready_at <= 10


def test_a_time_that_was_not_measured_is_not_a_time_without_demand() -> None:
    """The control loop was away for a while."""
    history = tuple((float(at), 0.0) for at in (*range(30), *range(60, 100)))
    state = ElasticState(1, 0.0, "", history=history, ready_at=0.0)
    one = Expert(policy(), state, Demand(), Supply((True,)))
    assert decide({"math": one}, 100.0)["math"].replicas == 1
    assert decide({"math": replace(one, policy=policy(idle_s=30.0))}, 100.0)["math"].replicas == 0


def test_a_replica_whose_walltime_ends_goes_earlier() -> None:
    """It would need a successor."""
    simulated = Simulated(policy(idle_s=120.0))
    for _ in range(60):
        simulated.step(1)
    began = simulated.now
    while simulated.state.replicas and simulated.now < began + 200:
        simulated.step(0, ends_soon=True)
    assert 60 <= simulated.now - began <= 70
    assert "the walltime of the last replica ends" in simulated.state.reason


def test_changed_limits_apply_at_once() -> None:
    state = ElasticState(3, 0.0, "", changes=(8.0, 9.0))
    one = Expert(policy(max_replicas=2), state, Demand(2 * PLACES, 0, 0.0, 10.0), Supply((True,) * 3))
    assert decide({"math": one}, 10.0)["math"].replicas == 2
    assert decide({"math": replace(one, policy=policy(min_replicas=4))}, 10.0)["math"].replicas == 4


def a_gpu(replicas: int, *, requests: int = 0, least: int = 0, last: float | None = None) -> Expert:
    state = ElasticState(replicas, 0.0, "", history=((0.0, 0.0), (190.0, float(requests))), ready_at=0.0)
    demand = Demand(requests, 0, 0.0, 200.0 if requests else last)
    return Expert(policy(gpus=1, min_replicas=least), state, demand, Supply((True,) * replicas, until_ready_s=10.0))


def test_without_room_for_gpus_it_says_so() -> None:
    experts = {"math": a_gpu(0, requests=20), "code": a_gpu(2, requests=12)}
    after = decide(experts, 200.0, free_gpus=3)
    assert {name: state.replicas for name, state in after.items()} == {"math": 1, "code": 2}
    assert after["math"].blocked == "its demand needs 4 replicas, and cluster.max_gpus has no room for them"
    assert after["code"].blocked is None


def test_an_unused_expert_gives_its_gpus_to_one_without_replicas() -> None:
    experts = {"math": a_gpu(0, requests=2), "code": a_gpu(2, last=50.0), "law": a_gpu(1, last=20.0, least=1)}
    after = decide(experts, 200.0, free_gpus=3)
    assert {name: state.replicas for name, state in after.items()} == {"math": 1, "code": 0, "law": 1}
    assert after["code"].reason == "it is not used, and math needs its GPUs"


# The cap, with the decisions, the handovers and the jobs together.


@dataclass
class Cluster:
    """Jobs that wait, load, serve and drain for random times, and end with their walltime. The decisions and the
    actions are the product's."""

    seed: int
    now: float = 1000.0
    attempts: dict[Slot, list[Attempt]] = field(default_factory=dict)
    plans: dict[str, tuple[float, float]] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        names = ["math", "code", "law"][: self.random.randint(1, 3)]
        self.gpus = {name: self.random.choice([1, 2, 4]) for name in names}
        self.max_gpus = self.random.randint(max(self.gpus.values()), 12)
        self.policies = {
            name: policy(
                max_replicas=self.random.randint(1, 6),
                idle_s=self.random.choice([10.0, 30.0, 60.0]),
                gpus=self.gpus[name],
                places=4,
            )
            for name in names
        }
        self.states = {name: ElasticState(0, self.now, "first") for name in names}
        self.loads = dict.fromkeys(names, 0)
        self.last: dict[str, float] = {}
        self.used = 0

    def step(self) -> None:
        self.now += PASS_S
        for name in self.loads:
            if self.random.random() < 0.05:
                self.loads[name] = self.random.choice([0, 0, 1, 5, 12, 30])
            if self.loads[name]:
                self.last[name] = self.now
        self._live()
        observed = {slot: tuple(attempts) for slot, attempts in self.attempts.items()}
        handovers = schedule(observed, dict.fromkeys(self.gpus, HandoverPolicy("overlap", 5, 10, 5)), {})
        experts = {name: self._expert(name, handovers) for name in self.states}
        self.states = decide(experts, self.now, free_gpus=self.max_gpus)
        desired = Desired(
            replicas={name: state.replicas for name, state in self.states.items()},
            handovers=dict.fromkeys(self.gpus, HandoverPolicy("overlap", 5, 10, 5)),
            drain_s=10.0, elastic=self.states, gpus=self.gpus, max_gpus=self.max_gpus,
        )  # fmt: skip
        for action in reconcile(desired, observed, self.now, handovers):
            self._act(action)
        held = sum(self.gpus[a.slot.expert] for attempts in self.attempts.values() for a in attempts if self._holds(a))
        assert held <= self.max_gpus, f"seed {self.seed} at {self.now}: {held} GPUs of {self.max_gpus}"
        assert sum(self.gpus[n] * s.replicas for n, s in self.states.items()) <= self.max_gpus
        self.used = max(self.used, held)

    def _holds(self, attempt: Attempt) -> bool:
        """A job that runs, or may start at any time."""
        return attempt.holds_resources and not (attempt.job is JobState.PENDING and self._waits(attempt))

    def _waits(self, attempt: Attempt) -> bool:
        others = self.attempts[attempt.slot]
        return any(a.job_id == attempt.after and a.holds_resources for a in others)

    def _expert(self, name: str, handovers: dict[str, Due]) -> Expert:
        state, slots = self.states[name], []
        for number in range(state.replicas):
            slots.append(any(a.ready and not a.stop_requested for a in self.attempts.get(Slot(name, str(number)), ())))
        last = self.attempts.get(Slot(name, str(state.replicas - 1)), ())
        soon = any(a.ready and handovers[a.replica].due_at <= self.now + 6 for a in last if a.replica in handovers)
        places = 4 * sum(slots)
        waiting = max(0, self.loads[name] - places)
        demand = Demand(self.loads[name] - waiting, waiting, 20.0 if waiting else 0.0, self.last.get(name))
        return Expert(self.policies[name], state, demand, Supply(tuple(slots), until_ready_s=10.0, ends_soon=soon))

    def _live(self) -> None:
        """Starts, readies and ends jobs."""
        for attempts in self.attempts.values():
            for place, attempt in enumerate(attempts):
                if attempt.job is JobState.ENDED:
                    continue
                starts_at, load_s = self.plans[attempt.replica]
                if attempt.job is JobState.PENDING and self.now >= starts_at and not self._waits(attempt):
                    attempts[place] = replace(
                        attempt, report=JobReport(JobState.RUNNING), started_at=self.now, expires_at=self.now + 120.0
                    )
                    continue
                started_at = attempt.started_at
                if started_at is None:
                    continue
                if self.random.random() < 0.004 or self.now >= min(
                    attempt.expires_at or 1e99, self.ends.get(attempt.replica, 1e99)
                ):
                    ok = self.random.random() < 0.8
                    end = Exit(ok, FailureReason.DRAINED if ok else FailureReason.NODE_FAILED, "it ended", at=self.now)
                    attempts[place] = replace(attempt, report=JobReport(JobState.ENDED), exit=end, registered=None)
                elif attempt.registered is None and self.now >= started_at + load_s:
                    ready = JobProgress(JobPhase.READY, ready_at=self.now)
                    attempts[place] = replace(attempt, progress=ready, registered=State.READY)

    def _act(self, action: object) -> None:
        if isinstance(action, Submit):
            self.plans[action.replica] = (self.now + self.random.uniform(0, 30), self.random.uniform(5, 20))
            attempt = Attempt(
                action.slot, action.generation, JobReport(JobState.PENDING), self.now, job_id=action.replica,
                runner=Runner.SLURM, submitted_at=self.now, after=action.after,
            )  # fmt: skip
            self.attempts.setdefault(action.slot, []).append(attempt)
        elif isinstance(action, ReleaseJob | Drain | Cancel | Kill):
            for attempts in self.attempts.values():
                for place, attempt in enumerate(attempts):
                    if attempt.replica == action.replica:
                        attempts[place] = self._ordered(attempt, action)

    def _ordered(self, attempt: Attempt, action: object) -> Attempt:
        if isinstance(action, ReleaseJob):
            return replace(attempt, after=None)
        if isinstance(action, Drain):
            self.ends[attempt.replica] = self.now + self.random.choice([2.0, 20.0, 60.0])
            return replace(attempt, stop=Stop(drain_at=self.now, until_at=action.until_at), registered=State.DRAINING)
        self.ends[attempt.replica] = self.now
        if attempt.job is JobState.PENDING:
            end = Exit(ok=True, reason=FailureReason.DRAINED, message="cancelled", at=self.now)
            return replace(attempt, report=JobReport(JobState.ENDED), exit=end)
        return replace(attempt, stop=replace(attempt.stop, cancel_at=self.now))


def never_too_many_gpus(seed: int) -> Cluster:
    cluster = Cluster(seed)
    for _ in range(300):
        cluster.step()
    return cluster


def test_the_gpu_cap_holds_for_some_seeds() -> None:
    clusters = [never_too_many_gpus(seed) for seed in range(20)]
    assert sum(cluster.used > cluster.max_gpus - min(cluster.gpus.values()) for cluster in clusters) >= 10, (
        "cap reached"
    )
    served = [a for c in clusters for attempts in c.attempts.values() for a in attempts if a.ready_at is not None]
    assert len(served) > 100


@pytest.mark.long
def test_the_gpu_cap_holds_for_1000_seeds() -> None:
    for seed in range(1000):
        never_too_many_gpus(seed)


def test_no_successor_is_submitted_for_a_replica_that_is_about_to_go() -> None:
    """Scaled to zero while its walltime ends."""
    cluster = Cluster(0)
    one = Attempt(
        Slot("math", "0"), 1, JobReport(JobState.RUNNING), 0.0, job_id="7", runner=Runner.SLURM, started_at=0.0,
        progress=JobProgress(JobPhase.READY, ready_at=10.0), registered=State.READY, expires_at=200.0,
    )  # fmt: skip
    observed, handover = {one.slot: (one,)}, {"math": HandoverPolicy("overlap", 5, 10, 5)}
    kept = Desired(replicas={"math": 1}, handovers=handover)
    assert [type(a) for a in reconcile(kept, observed, 190.0)] == [Submit]
    state = ElasticState(0, 190.0, "no request for 60 s")
    gone = replace(kept, replicas={"math": 0}, elastic={"math": state})
    assert reconcile(gone, observed, 185.0) == [Drain("math-0.g1", 190.0)]
    assert cluster.states


def test_surplus_jobs_drain_until_their_last_request_has_ended() -> None:
    """Without a walltime for up to a day; other experts' jobs get cluster.drain_s."""
    one = Attempt(
        Slot("math", "0"), 1, JobReport(JobState.RUNNING), 0.0, registered=State.READY,
        progress=JobProgress(JobPhase.READY, ready_at=10.0),
    )  # fmt: skip
    gone = Desired(replicas={"math": 0}, elastic={"math": ElasticState(0, 0.0, "")}, drain_s=30.0)
    assert reconcile(gone, {one.slot: (one,)}, 100.0) == [Drain("math-0.g1", 100.0 + 86400)]
    assert reconcile(replace(gone, elastic={}), {one.slot: (one,)}, 100.0) == [Drain("math-0.g1", None)]


def test_a_slot_that_is_wanted_again_while_its_job_drains_gets_the_next_job_at_once() -> None:
    one = Attempt(
        Slot("math", "0"), 1, JobReport(JobState.RUNNING), 0.0, registered=State.DRAINING,
        progress=JobProgress(JobPhase.DRAINING, ready_at=10.0), stop=Stop(drain_at=90.0, until_at=9000.0),
    )  # fmt: skip
    wanted = Desired(replicas={"math": 1}, elastic={"math": ElasticState(1, 0.0, "")})
    actions = reconcile(wanted, {one.slot: (one,)}, 100.0)
    assert [a for a in actions if isinstance(a, Submit)] == [Submit(one.slot, 2)]
    assert not any(isinstance(a, Cancel | Kill) for a in actions)


def test_a_handover_without_room_for_two_jobs_waits_for_the_end_of_the_first() -> None:
    one = Attempt(
        Slot("math", "0"), 1, JobReport(JobState.RUNNING), 0.0, job_id="7", runner=Runner.SLURM, started_at=0.0,
        progress=JobProgress(JobPhase.READY, ready_at=10.0), registered=State.READY, expires_at=200.0,
    )  # fmt: skip
    observed = {one.slot: (one,)}
    desired = Desired(
        replicas={"math": 1}, handovers={"math": HandoverPolicy("overlap", 5, 10, 5)}, gpus={"math": 2}, max_gpus=3
    )
    assert reconcile(desired, observed, 190.0) == [Submit(one.slot, 2, after="7", replaces="math-0.g1")]
    successor = replace(
        one, generation=2, report=JobReport(JobState.PENDING, pending_reason="Dependency"), after="7", job_id="8",
        progress=None, registered=None, expires_at=None,
    )  # fmt: skip
    assert held_gpus({"math": 2}, {one.slot: (one, successor)}) == 2
    both = {one.slot: (one, successor)}
    assert reconcile(desired, both, 190.0) == []
    assert reconcile(replace(desired, max_gpus=4), both, 190.0) == [ReleaseJob("math-0.g2", "math-0.g1")]


def test_jobs_beyond_the_cap_wait() -> None:
    desired = Desired(replicas={"math": 2, "code": 1}, gpus={"math": 2, "code": 1}, max_gpus=3)
    actions = reconcile(desired, {}, 0.0)
    assert [a.replica for a in actions if isinstance(a, Submit)] == ["math-0.g1", "code-0.g1"]
    assert [pair for pair in pairwise(actions) if isinstance(pair[1], Submit)]
