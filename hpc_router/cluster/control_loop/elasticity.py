"""Decides how many replicas each elastic expert has, from its measured demand. Pure: no I/O, time is an argument.

The demand of an expert is the number of its requests in flight and waiting; its places are the requests that its
replicas take at the same time. The rules, in this order:
1. An expert without replicas gets some as soon as a request has come for it.
2. An expert gets more replicas when its expected demand fills more than `UP_SHARE` of its places, or when requests wait
   long although all its replicas are ready. The expected demand is that at the time when the new replicas are ready.
3. An expert gets fewer replicas only when all were ready and its demand was low for `idle_s`, the demand has settled,
   and it would fill at most `DOWN_SHARE` of the places that remain. So a start is never given up before it could be
   used. A replica whose walltime ends soon goes after half of `idle_s` instead of getting a successor.
4. An expert changes at most MAX_CHANGES times in `2 * idle_s`, except by rule 1 and while requests wait long.
5. The replicas of all experts together have at most `max_gpus` GPUs. Experts without replicas come first, and then
   those whose requests wait longest. For an expert without replicas, an unused expert gives up replicas.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

UP_SHARE: Final = 0.8
DOWN_SHARE: Final = 0.6
MAX_CHANGES: Final = 2
LONG_WAIT_S: Final = 10.0
"""Expected wait in seconds beyond which requests wait long."""
SETTLE_S: Final = 60.0
"""Time in seconds after which further replicas are added although the last ones are not ready yet."""
GROWTH: Final = 2
"""With the last change that it may make for some time, an expert grows at least by this number, and to twice its
replicas."""
MAX_GROWTH: Final = 3.0
"""Maximum of the demand to which a trend is continued, as a multiple of the present demand."""
NOISE: Final = 3.0
"""Standard deviations of a steady demand by which it must grow before the growth counts as a trend."""
TREND_S: Final = (10.0, 60.0)
"""Minimum and maximum length in seconds of the time from which the trend is taken; between them, a quarter of
`idle_s`."""
_BINS: Final = 8
"""Number of samples in the time from which the trend is taken."""
_UNLIMITED: Final = 10**9
MAX_GAP_SHARE: Final = 0.25
"""Longest gap between two measurements, as a share of a time that counts as a time of low demand."""


@dataclass(frozen=True, slots=True)
class ElasticPolicy:
    """The limits of one expert. `idle_s`: seconds of low demand before it gets fewer replicas. `places`: requests that
    one replica takes at the same time. `max_in_flight`: requests that all replicas together may have. `gpus`: GPUs of
    one replica. `first`: number of replicas before the first decision."""

    min_replicas: int
    max_replicas: int
    idle_s: float
    places: int
    gpus: int = 0
    max_in_flight: int | None = None
    first: int = 1


@dataclass(frozen=True, slots=True)
class Demand:
    """The measured demand of one expert now. `wait_s`: expected wait of a new request in seconds. `last_request_at`:
    Unix time of the last request for it, even if the request was refused or went to another expert because this one had
    no replica."""

    in_flight: int = 0
    waiting: int = 0
    wait_s: float = 0.0
    last_request_at: float | None = None


@dataclass(frozen=True, slots=True)
class Supply:
    """The replicas of one expert. `ready`: for each slot, whether its replica is ready. `failed`: for each slot,
    whether it is given up because its jobs failed. `until_ready_s`: expected seconds from the submission of a job until
    it is ready. `ends_soon`: whether the walltime of the replica in the last slot ends so soon that its successor is
    due."""

    ready: tuple[bool, ...] = ()
    failed: tuple[bool, ...] = ()
    until_ready_s: float = 0.0
    ends_soon: bool = False


@dataclass(frozen=True, slots=True)
class ElasticState:
    """The decision for one expert. `replicas`: number of replicas. `reason`: why it is that number. `changes`: times of
    the last changes. `history`: pairs (start of a short period, maximum demand in it), oldest first. `blocked`: why it
    has fewer replicas than its demand needs; None if it has enough. `ready_at`: since when all its replicas are ready;
    None if they are not. Times are Unix seconds."""

    replicas: int
    changed_at: float
    reason: str
    changes: tuple[float, ...] = ()
    history: tuple[tuple[float, float], ...] = ()
    last_request_at: float | None = None
    blocked: str | None = None
    ready_at: float | None = None


@dataclass(frozen=True, slots=True)
class Expert:
    """All inputs of the decision for one expert."""

    policy: ElasticPolicy
    state: ElasticState
    demand: Demand
    supply: Supply = field(default_factory=Supply)


def decide(experts: Mapping[str, Expert], now: float, *, free_gpus: int | None = None) -> dict[str, ElasticState]:
    """Returns the new state of each expert. `free_gpus`: GPUs that the elastic experts may have together; None: no
    limit."""
    states = {name: _measured(expert, now) for name, expert in experts.items()}
    current = {name: replace(expert, state=states[name]) for name, expert in experts.items()}
    for name, expert in current.items():
        target, reason = _target(expert, now)
        if target < expert.state.replicas:
            states[name] = _changed(expert.state, target, reason, now)
    by_need = sorted(current, key=lambda name: (current[name].state.replicas > 0, -current[name].demand.wait_s, name))
    for name in by_need:
        expert = current[name]
        target, reason = _target(expert, now)
        if target > expert.state.replicas:
            if expert.state.replicas == 0:
                _reclaim(current, states, name, free_gpus, now)
            states[name] = _grown(expert, target, reason, _room(current, states, free_gpus), now)
    return states


def fits(policy: ElasticPolicy, demand: float, share: float) -> int:
    """Returns the smallest number of replicas with which `demand` requests fill at most the share `share` of the
    places. The number is within the limits of the expert, and at least one if there is any demand."""
    bounded = demand if policy.max_in_flight is None else min(demand, policy.max_in_flight)
    needed = max(1, math.ceil(bounded / (policy.places * share) - 1e-9)) if demand > 0 else 0
    return min(max(needed, policy.min_replicas), policy.max_replicas)


def _target(expert: Expert, now: float) -> tuple[int, str]:
    """Returns the number of replicas that the expert should have if GPUs were not limited, and why."""
    policy, state, demand = expert.policy, expert.state, expert.demand
    if state.replicas < policy.min_replicas:
        return policy.min_replicas, f"min_replicas is {policy.min_replicas}"
    if state.replicas > policy.max_replicas:
        return policy.max_replicas, f"max_replicas is {policy.max_replicas}"
    requests = demand.in_flight + demand.waiting
    expected = _expected(expert, requests)
    needed = fits(policy, expected, UP_SHARE)
    if state.replicas == 0:
        asked = demand.last_request_at is not None and demand.last_request_at > state.changed_at
        first = max(needed, min(1, policy.max_replicas)) if asked or requests else 0
        return first, "a request came while it had no replica"
    ready = state.ready_at is not None
    helps = policy.max_in_flight is None or policy.max_in_flight > state.replicas * policy.places
    waits_long = demand.waiting > 0 and demand.wait_s >= LONG_WAIT_S and ready and helps
    if waits_long:
        needed = max(needed, min(state.replicas + 1, policy.max_replicas))
    if needed > state.replicas:
        settled = ready or now - state.changed_at >= SETTLE_S
        if not settled or not (waits_long or _may_change(expert, now)):
            return state.replicas, ""
        if _recent_changes(expert, now):  # the last change for some time
            needed = min(max(needed, state.replicas + max(GROWTH, state.replicas)), policy.max_replicas)
        load = f"{requests} requests for {state.replicas * policy.places} places"
        if waits_long:
            load += f", which wait for about {demand.wait_s:.0f} s"
        elif expected > requests:
            load += f", and about {expected:.0f} are expected when a replica is ready"
        return needed, load
    return _lower(expert, needed, now)


def _lower(expert: Expert, needed: int, now: float) -> tuple[int, str]:
    """Returns the number of replicas to which the expert may be reduced, given its demand in the last `idle_s`, and
    why; the present number if it may not. `needed`: number of replicas that the expected demand needs."""
    policy, state, supply = expert.policy, expert.state, expert.supply
    window_s = policy.idle_s / 2 if supply.ends_soon else policy.idle_s
    whole, half = _peak(state, now - window_s), _peak(state, now - window_s / 2)
    low = max(needed, fits(policy, whole, DOWN_SHARE))
    settled = fits(policy, whole, DOWN_SHARE) == fits(policy, half, DOWN_SHARE)
    used = state.ready_at is not None and now - state.ready_at >= window_s
    measured = used and _is_measured(expert, now - window_s, now)
    serves = all(supply.ready[:low]) and len(supply.ready) >= low
    if low >= state.replicas or not measured or not settled or not serves:
        return state.replicas, ""
    if not supply.ends_soon and not _may_change(expert, now):
        return state.replicas, ""
    ends = "; the walltime of the last replica ends" if supply.ends_soon else ""
    if whole == 0:
        return low, f"no request for {window_s:.0f} s{ends}"
    return low, f"at most {whole:.0f} requests at a time for {window_s:.0f} s{ends}"


def _expected(expert: Expert, requests: int) -> float:
    """Returns the demand that is expected when a replica that is submitted now would be ready: the present `requests`,
    plus the recent growth continued until then. Requests that come at random vary by the square root of their mean
    number (Poisson distribution), so only growth beyond NOISE times that counts."""
    policy = expert.policy
    window = [most for _, most in expert.state.history[-_BINS:]]
    if len(window) < _BINS:
        return requests
    half = _BINS // 2
    early, late = sum(window[:half]) / half, sum(window[half:]) / half
    noise = NOISE * math.sqrt(max(1.0, (early + late) / 2))
    growth_per_s = (late - early - noise) / (half * _bin_s(policy))
    horizon_s = expert.supply.until_ready_s + policy.idle_s / 2
    return min(requests + max(0.0, growth_per_s) * horizon_s, MAX_GROWTH * requests)


def _recent_changes(expert: Expert, now: float) -> int:
    """Returns how often the expert's number of replicas has changed in the last `2 * idle_s` seconds."""
    return sum(at > now - 2 * expert.policy.idle_s for at in expert.state.changes)


def _may_change(expert: Expert, now: float) -> bool:
    return _recent_changes(expert, now) < MAX_CHANGES


def _is_measured(expert: Expert, since: float, now: float) -> bool:
    """Returns whether the demand was measured from `since` until now without a long gap."""
    history = expert.state.history
    times = [*[at for at, _ in history if at <= since][-1:], *[at for at, _ in history if at > since], now]
    most_s = max(MAX_GAP_SHARE * (now - since), 3 * _bin_s(expert.policy))
    return times[0] <= since and all(b - a <= most_s for a, b in pairwise(times))


def _measured(expert: Expert, now: float) -> ElasticState:
    """Returns the expert's state with the present demand added to its history."""
    state, demand, width_s = expert.state, expert.demand, _bin_s(expert.policy)
    requests = float(demand.in_flight + demand.waiting)
    history = list(state.history)
    if history and history[-1][0] + width_s > now:
        history[-1] = (history[-1][0], max(history[-1][1], requests))
    else:
        history.append((now, requests))
    kept = tuple(sample for sample in history if sample[0] > now - expert.policy.idle_s - _BINS * width_s)
    times = [at for at in (state.last_request_at, demand.last_request_at) if at is not None]
    last_at = max(times, default=None)
    ready_at = None if not _is_ready(expert) else now if state.ready_at is None else state.ready_at
    return replace(state, history=kept, last_request_at=last_at, blocked=None, ready_at=ready_at)


def _is_ready(expert: Expert) -> bool:
    """Returns whether the expert's replicas are ready in all slots that have not failed."""
    ready, failed = expert.supply.ready, expert.supply.failed
    slots = range(expert.state.replicas)
    return all((n < len(ready) and ready[n]) or (n < len(failed) and failed[n]) for n in slots)


def _bin_s(policy: ElasticPolicy) -> float:
    """Returns for how many seconds one entry of the history keeps the maximum demand."""
    return min(max(policy.idle_s / 4, TREND_S[0]), TREND_S[1]) / _BINS


def _peak(state: ElasticState, since: float) -> float:
    """Returns the maximum demand since `since`, from the history. The entry that had begun before counts as well."""
    later = [most for at, most in state.history if at > since]
    earlier = [most for at, most in state.history if at <= since]
    return max([*earlier[-1:], *later], default=0.0)


def _changed(state: ElasticState, replicas: int, reason: str, now: float) -> ElasticState:
    changes = (*state.changes, now)[-MAX_CHANGES:]
    return replace(state, replicas=replicas, changed_at=now, reason=reason, changes=changes, ready_at=None)


def _grown(expert: Expert, target: int, reason: str, room: int, now: float) -> ElasticState:
    """Returns the state with `target` replicas, or with fewer if `room`, the number of free GPUs, does not suffice."""
    policy, state = expert.policy, expert.state
    more = target - state.replicas
    granted = more if not policy.gpus else min(more, max(0, room // policy.gpus))
    grown = _changed(state, state.replicas + granted, reason, now) if granted else state
    if granted == more:
        return grown
    return replace(grown, blocked=f"its demand needs {target} replicas, and cluster.max_gpus has no room for them")


def _room(experts: Mapping[str, Expert], states: Mapping[str, ElasticState], free_gpus: int | None) -> int:
    """Returns how many of the `free_gpus` are left after the replicas in `states`."""
    if free_gpus is None:
        return _UNLIMITED
    return free_gpus - sum(states[name].replicas * expert.policy.gpus for name, expert in experts.items())


def _reclaim(
    experts: Mapping[str, Expert],
    states: dict[str, ElasticState],
    taker: str,
    free_gpus: int | None,
    now: float,
) -> None:
    """Reduces unused experts to their minimum of replicas, the longest unused first, until there are enough GPUs for
    one replica of the expert `taker`. Changes `states`."""
    unused = [
        name
        for name, expert in experts.items()
        if name != taker
        and expert.policy.gpus
        and states[name].replicas == expert.state.replicas > expert.policy.min_replicas
        and _peak(expert.state, now - TREND_S[0]) == 0
        and expert.state.ready_at is not None
        and now - expert.state.ready_at >= TREND_S[0]
    ]
    for name in sorted(unused, key=lambda name: (experts[name].state.last_request_at or 0.0, name)):
        if _room(experts, states, free_gpus) >= experts[taker].policy.gpus:
            return
        reason = f"it is not used, and {taker} needs its GPUs"
        states[name] = _changed(experts[name].state, experts[name].policy.min_replicas, reason, now)
