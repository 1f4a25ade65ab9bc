"""Computes the figures of one measurement point from its observed requests. Pure functions; docs/bench.md defines the
figures in words.

Latencies are those of measured requests that succeeded. Failed requests are counted by kind of error. Throughput counts
all tokens and responses in the window, of measured and unmeasured requests, except those that failed. Times are seconds
since the start of the point's load.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Self

import numpy as np

from hpc_router.bench.config import GoodputLimits

UNKNOWN: Final = "unknown"
CUT: Final = "cut"
"""Error of an unmeasured request that was stopped at the end of the measurement point. It does not count as a
failure."""


CANCELLED: Final = "cancelled"
"""Error of a request that the client cancelled while it streamed, as the load said. It is no failure, and neither its
latencies nor its goodput count."""


class MeasurementPart(StrEnum):
    """The part of the load in which a request began."""

    WARM_UP = "warm_up"
    MEASURED = "measured"
    FILLING = "filling"  # after the window, to keep up the load until the last measured request has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One observed request.

    `content_s`: arrival times of the events with content. `tokens`, `prompt_tokens`, `cached_tokens`: numbers reported
    by the engine. `load_class`: class of the request's conversation; `turn`: number of its turn in the conversation.
    `question`: index of the request body in the workload. `error`: kind of error; None if the request succeeded.
    """

    part: MeasurementPart
    user: int
    started_s: float
    ended_s: float
    content_s: Sequence[float] = ()
    tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    question: int | None = None
    status: int | None = None
    expert: str | None = None
    replica: str | None = None
    reason: str | None = None
    domain: str | None = None
    load_class: str | None = None
    turn: int | None = None
    error: str | None = None

    @property
    def token_count(self) -> int:
        """Returns the number of tokens as counted by the engine, or else the number of events with content."""
        return len(self.content_s) if self.tokens is None else self.tokens

    @property
    def ttft_s(self) -> float:
        return self.content_s[0] - self.started_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def tpot_s(self) -> float | None:
        """Returns the time per output token after the first, in seconds; None for a response of one token."""
        if self.token_count < 2:
            return None
        return (self.content_s[-1] - self.content_s[0]) / (self.token_count - 1)

    @property
    def itl_s(self) -> list[float]:
        """Returns the gaps in seconds between successive events with content. Each gap is divided by the response's
        mean number of tokens per event."""
        per_event = max(1.0, self.token_count / len(self.content_s))
        return [(b - a) / per_event for a, b in zip(self.content_s, self.content_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a load that is measured: the times after `start_s`, up to and including `end_s`."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    def contains(self, at_s: float) -> bool:
        return self.start_s < at_s <= self.end_s


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The percentiles of some samples, interpolated linearly between the two nearest samples."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Self | None:
        """Returns the percentiles; None if there are no samples."""
        values = np.fromiter(samples, dtype=np.float64)
        if not values.size:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(values.size, float(values.mean()), p50, p90, p99, float(values.max()))


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """The figures of a group of successful requests. `hit_share`: share of the requests' prompt tokens that came from
    the engines' prefix caches; None if no engine reports this."""

    count: int
    ttft_s: Percentiles | None
    e2e_s: Percentiles | None
    hit_share: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one measurement point. The rates and the number of tokens refer to the window, and all other
    figures to the measured requests."""

    window_s: float
    requests: int
    succeeded: int
    failed: int
    errors: Mapping[str, int]
    experts: Mapping[str, float]  # share of the succeeded requests, per expert
    replicas: Mapping[str, float]  # share of the succeeded requests, per replica
    balance: Mapping[str, float]  # per expert: requests of its busiest replica / mean of its replicas; 1 is even
    reasons: Mapping[str, float]  # share of the succeeded requests, per `x-route-reason`
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    tpot_s: Percentiles | None
    e2e_s: Percentiles | None
    session_tokens_per_s: Percentiles | None
    tokens: float
    tokens_per_s: float
    requests_per_s: float
    counted_by: str  # source of the token counts: engine | events | both
    prompt_tokens: Percentiles | None = None
    output_tokens: Percentiles | None = None
    good_share: float = 0.0  # share of the measured requests within the goodput limits
    goodput_per_s: float = 0.0  # responses within the goodput limits that ended in the window
    medians: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # per expert: ttft_s, tpot_s, e2e_s
    cancelled: int = 0  # measured requests that the client cancelled
    exceeded: bool = False  # over-saturated: the load ended early, because too many requests were in flight
    hit_tokens: int | None = None  # prompt tokens from prefix caches; None if no engine says so
    hit_share: float | None = None  # of all prompt tokens of the requests whose engine says so
    jain: Mapping[str, float] = field(default_factory=dict)  # per expert: Jain index of its replicas' computed tokens
    classes: Mapping[str, GroupFigures] = field(default_factory=dict)  # per class of the load
    turns: Mapping[str, GroupFigures] = field(default_factory=dict)  # per turn of a conversation, from 1


NO_LIMITS: Final = GoodputLimits(ttft_s=None, tpot_s=None, e2e_s=None)


def meets(one: Observation, limits: GoodputLimits) -> bool:
    """Returns whether the response's latencies are within every limit. The limit on TPOT (time per output token) does
    not apply to a response of one token, which has no TPOT."""
    tpot_s = one.tpot_s
    return (
        (limits.ttft_s is None or one.ttft_s <= limits.ttft_s)
        and (limits.tpot_s is None or tpot_s is None or tpot_s <= limits.tpot_s)
        and (limits.e2e_s is None or one.e2e_s <= limits.e2e_s)
    )


def figures(
    observations: Sequence[Observation],
    window: Window,
    limits: GoodputLimits = NO_LIMITS,
    *,
    exceeded: bool = False,
) -> Figures:
    """Returns the figures of the observed requests. `limits`: the latency limits for goodput. `exceeded`: whether the
    load ended early, because too many requests were in flight."""
    measured = [o for o in observations if o.part is MeasurementPart.MEASURED]
    good = [o for o in measured if o.error is None]
    cancelled = sum(o.error == CANCELLED for o in measured)
    errors = Counter(o.error for o in measured if o.error not in (None, CANCELLED))
    counted = [o for o in good if o.cached_tokens is not None and o.prompt_tokens]
    experts = Counter(o.expert or UNKNOWN for o in good)
    replicas = Counter(o.replica or UNKNOWN for o in good)
    reasons = Counter(o.reason or UNKNOWN for o in good)
    within = [o for o in good if meets(o, limits)]
    tokens = _tokens_in(window, observations)
    ended = [o for o in observations if o.error is None and window.contains(o.ended_s)]

    def per_s(count: float) -> float:
        return count / window.length_s if window.length_s > 0 else 0.0

    return Figures(
        window_s=window.length_s,
        requests=len(measured),
        succeeded=len(good),
        failed=len(measured) - len(good) - cancelled,
        errors=dict(sorted(errors.items())),
        experts=_shares(experts),
        replicas=_shares(replicas),
        balance=_balance(good),
        reasons=_shares(reasons),
        ttft_s=Percentiles.of(o.ttft_s for o in good),
        itl_s=Percentiles.of(gap for o in good for gap in o.itl_s),
        tpot_s=Percentiles.of(tpot for o in good if (tpot := o.tpot_s) is not None),
        e2e_s=Percentiles.of(o.e2e_s for o in good),
        session_tokens_per_s=Percentiles.of(o.token_count / o.e2e_s for o in good if o.e2e_s > 0),
        tokens=tokens,
        tokens_per_s=per_s(tokens),
        requests_per_s=per_s(len(ended)),
        counted_by=_counted_by(good),
        prompt_tokens=Percentiles.of(o.prompt_tokens for o in good if o.prompt_tokens is not None),
        output_tokens=Percentiles.of(o.token_count for o in good),
        good_share=len(within) / (len(measured) - cancelled) if len(measured) > cancelled else 0.0,
        goodput_per_s=per_s(sum(meets(o, limits) for o in ended)),
        medians={name: _medians([o for o in good if (o.expert or UNKNOWN) == name]) for name in sorted(experts)},
        cancelled=cancelled,
        exceeded=exceeded,
        hit_tokens=sum(o.cached_tokens or 0 for o in counted) if counted else None,
        hit_share=_hit_share(good),
        jain=_jain(good),
        classes=_groups((o.load_class, o) for o in good),
        turns=_groups((None if o.turn is None else str(o.turn), o) for o in good),
    )


def _groups(pairs: Iterable[tuple[str | None, Observation]]) -> dict[str, GroupFigures]:
    found: dict[str, list[Observation]] = {}
    for name, one in pairs:
        if name is not None:
            found.setdefault(name, []).append(one)
    return {
        name: GroupFigures(
            len(seen), Percentiles.of(o.ttft_s for o in seen), Percentiles.of(o.e2e_s for o in seen), _hit_share(seen)
        )
        for name, seen in sorted(found.items(), key=lambda item: (len(item[0]), item[0]))
    }


def _hit_share(good: Sequence[Observation]) -> float | None:
    pairs = [(o.cached_tokens, o.prompt_tokens) for o in good if o.cached_tokens is not None and o.prompt_tokens]
    return sum(cached for cached, _ in pairs) / sum(prompt for _, prompt in pairs) if pairs else None


def _jain(good: Sequence[Observation]) -> dict[str, float]:
    """Returns for each expert Jain's fairness index of the numbers of tokens that its replicas computed for the
    successful requests in `good`: 1 if all numbers are equal. Ignores replicas without such a request."""
    work: dict[str, Counter[str]] = {}
    for o in good:
        tokens = max(0, (o.prompt_tokens or 0) - (o.cached_tokens or 0)) + o.token_count
        work.setdefault(o.expert or UNKNOWN, Counter())[o.replica or UNKNOWN] += tokens
    return {
        name: each.total() ** 2 / (len(each) * sum(value * value for value in each.values()))
        for name, each in sorted(work.items())
        if each.total()
    }


def _shares(counted: Counter[str]) -> dict[str, float]:
    whole = counted.total()
    return {name: count / whole for name, count in sorted(counted.items())}


def _balance(good: Sequence[Observation]) -> dict[str, float]:
    """Returns for each expert the number of requests of its busiest replica, divided by the mean over its replicas.
    Counts the successful requests in `good`, and ignores replicas without such a request."""
    found: dict[str, Counter[str]] = {}
    for o in good:
        found.setdefault(o.expert or UNKNOWN, Counter())[o.replica or UNKNOWN] += 1
    return {name: max(each.values()) * len(each) / each.total() for name, each in sorted(found.items())}


def _medians(good: Sequence[Observation]) -> dict[str, float]:
    found = {
        "ttft_s": Percentiles.of(o.ttft_s for o in good),
        "tpot_s": Percentiles.of(tpot for o in good if (tpot := o.tpot_s) is not None),
        "e2e_s": Percentiles.of(o.e2e_s for o in good),
    }
    return {name: spread.p50 for name, spread in found.items() if spread is not None}


def faster(observations: Sequence[Observation], factor: float) -> list[Observation]:
    """Returns the observations with all times divided by `factor`. If `factor` is the slowdown of simulated engines,
    the results are in simulated time."""
    return [
        replace(
            o,
            started_s=o.started_s / factor,
            ended_s=o.ended_s / factor,
            content_s=[at_s / factor for at_s in o.content_s],
        )
        for o in observations
    ]


def _tokens_in(window: Window, observations: Sequence[Observation]) -> float:
    """Returns the number of tokens that arrived in the window. An event counts as its response's mean number of tokens
    per event; if the engine did not report that response's tokens, as the mean over all responses."""
    counted = [o for o in observations if o.error is None and o.tokens is not None]
    events = sum(len(o.content_s) for o in counted)
    # Responses without a token count use the mean over all responses.
    mean = sum(o.tokens or 0 for o in counted) / events if events else 1.0
    total = 0.0
    for o in observations:
        if o.content_s and o.error in (None, CUT, CANCELLED):
            per_event = mean if o.tokens is None else o.tokens / len(o.content_s)
            total += per_event * sum(window.contains(at_s) for at_s in o.content_s)
    return total


def _counted_by(good: Sequence[Observation]) -> str:
    engine = {o.tokens is not None for o in good}
    return "both" if len(engine) == 2 else "engine" if True in engine else "events"
