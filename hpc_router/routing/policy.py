"""What becomes of a prompt whose request says `model: auto`: one small class per policy.

A policy answers at once from what it is given: the text, and the ready experts with their requests in flight. It
knows no replicas and waits for nothing. `select` may return an expert that is not ready; the router then walks
`order`. `explain` decides the same without leaving a trace, so asking about a prompt moves no rotation.
How a reason reads: `low_margin` and `no_known_terms` say what was seen, whoever gets the prompt (the fallback, or
without one the best expert); `unavailable`: the prompt's cluster has no expert here; `policy`: the text had no say.
`named` and `spilled` are the router's to give.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from hpc_router.errors import ConfigError, suggest
from hpc_router.routing.classifier import Classifier, Term

KINDS = ("classifier", "least_in_flight", "model_field", "round_robin")


class RouteReason(StrEnum):
    NAMED = "named"
    CLASSIFIED = "classified"
    POLICY = "policy"
    LOW_MARGIN = "low_margin"
    NO_KNOWN_TERMS = "no_known_terms"
    SPILLED = "spilled"
    UNAVAILABLE = "unavailable"


class Decision(NamedTuple):
    """`expert` None: nobody can take the prompt. `margin` lies between the cluster's expert and `runner_up`."""

    expert: str | None
    reason: RouteReason
    cluster: str | None = None
    score: float | None = None
    margin: float | None = None
    runner_up: str | None = None

    def to_dict(self, *, id: str | int | None) -> dict[str, object]:
        """The form of `POST /route`, `hpc-router route` and `classify predict` (*contract*)."""
        return {
            "id": id,
            "cluster": self.cluster,
            "expert": self.expert,
            "score": _rounded(self.score),
            "margin": _rounded(self.margin),
            "runner_up": self.runner_up,
            "reason": self.reason.value,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    decision: Decision
    terms: tuple[Term, ...] = ()

    def to_dict(self, *, id: str | int | None) -> dict[str, object]:
        terms = [{"term": term.term, "weight": _rounded(term.weight)} for term in self.terms]
        return {**self.decision.to_dict(id=id), "terms": terms}


class Policy(Protocol):
    weighs_load: bool
    """Whether it looks at `ready` at all, which costs the router more, the more replicas there are."""

    @property
    def shadow(self) -> "Policy | None":
        """What decides beside it and has no say."""

    @property
    def version(self) -> str | None:
        """What names the artefact behind the decisions, if there is one."""

    def select(self, text: str, *, ready: Mapping[str, int]) -> Decision:
        """`ready`: the ready experts and their requests in flight."""

    def explain(self, text: str, *, ready: Mapping[str, int]) -> Explanation: ...

    def order(self, decision: Decision) -> tuple[str, ...]:
        """Experts to try in turn: the chosen one, then who would do in its place."""


def versions(policy: Policy) -> tuple[str | None, str | None]:
    """Of the artefact that decides, and of its shadow's."""
    return policy.version, None if policy.shadow is None else policy.shadow.version


class ClassifierPolicy:
    """The expert of the prompt's cluster; the fallback where the cluster is in doubt or has no expert."""

    weighs_load = False

    def __init__(self, classifier: Classifier, *, fallback: str | None, shadow: "Policy | None" = None) -> None:
        self.shadow = shadow
        self.version = classifier.version
        self._classifier = classifier
        self._fallback = fallback
        self._expert_of = dict(zip(classifier.artefact.clusters, classifier.experts, strict=True))
        self._orders: dict[tuple[str | None, str | None, str | None], tuple[str, ...]] = {}

    def select(self, text: str, *, ready: Mapping[str, int]) -> Decision:
        found = self._classifier.classify(text)
        best = found.expert or self._fallback or found.runner_up
        if found.known_terms == 0:
            # Nothing of the prompt was recognised, so nothing is claimed about it.
            return Decision(self._fallback or best, RouteReason.NO_KNOWN_TERMS)
        if found.margin is not None and found.margin < self._classifier.margin_threshold:
            expert, reason = self._fallback or best, RouteReason.LOW_MARGIN
        elif found.expert is None:
            expert, reason = best, RouteReason.UNAVAILABLE
        else:
            expert, reason = best, RouteReason.CLASSIFIED
        return Decision(expert, reason, found.cluster, found.score, found.margin, found.runner_up)

    def explain(self, text: str, *, ready: Mapping[str, int]) -> Explanation:
        decision = self.select(text, ready=ready)
        if decision.reason is RouteReason.NO_KNOWN_TERMS:
            return Explanation(decision)
        return Explanation(decision, self._classifier.explain(text))

    def order(self, decision: Decision) -> tuple[str, ...]:
        key = decision.expert, decision.cluster, decision.runner_up
        if key not in self._orders:
            best = None if decision.cluster is None else self._expert_of[decision.cluster]
            self._orders[key] = _distinct(decision.expert, best, decision.runner_up, self._fallback)
        return self._orders[key]


class RoundRobin:
    """Ready experts in turn, by name, whoever comes and goes."""

    version = None
    weighs_load = True
    shadow = None

    def __init__(self, *, fallback: str | None = None) -> None:
        self._fallback = fallback
        self._last = ""

    def select(self, text: str, *, ready: Mapping[str, int]) -> Decision:
        decision = self.explain(text, ready=ready).decision
        self._last = decision.expert or self._last
        return decision

    def explain(self, text: str, *, ready: Mapping[str, int]) -> Explanation:
        return Explanation(_given(_next(self._candidates(ready), after=self._last)))

    def order(self, decision: Decision) -> tuple[str, ...]:
        return _distinct(decision.expert, self._fallback)

    def _candidates(self, ready: Mapping[str, int]) -> list[str]:
        return sorted(ready)


class LeastInFlight(RoundRobin):
    """The ready expert with the fewest requests in flight; equals take turns."""

    def _candidates(self, ready: Mapping[str, int]) -> list[str]:
        least = min(ready.values(), default=0)
        return sorted(name for name, count in ready.items() if count == least)


class ModelField:
    """Clients name their expert; `auto` means the fallback, and without one nobody (the router answers 404)."""

    version = None
    weighs_load = False
    shadow = None

    def __init__(self, *, fallback: str | None) -> None:
        self._fallback = fallback

    def select(self, text: str, *, ready: Mapping[str, int]) -> Decision:
        return Decision(self._fallback, RouteReason.POLICY)

    def explain(self, text: str, *, ready: Mapping[str, int]) -> Explanation:
        return Explanation(self.select(text, ready=ready))

    def order(self, decision: Decision) -> tuple[str, ...]:
        return _distinct(decision.expert)


def build_policy(
    *, kind: str, classifier: Classifier | None = None, fallback: str | None = None, shadow: Policy | None = None
) -> Policy:
    match kind:
        case "classifier":
            if classifier is None:
                raise ConfigError(
                    "policy=classifier has no classifier: give the experts exemplars or name one with policy.artefact"
                )
            return ClassifierPolicy(classifier, fallback=fallback, shadow=shadow)
        case "round_robin":
            return RoundRobin(fallback=fallback)
        case "least_in_flight":
            return LeastInFlight(fallback=fallback)
        case "model_field":
            return ModelField(fallback=fallback)
        case _:
            raise ConfigError(f"unknown policy '{kind}'{suggest(kind, KINDS)}")


def _given(expert: str | None) -> Decision:
    return Decision(expert, RouteReason.UNAVAILABLE if expert is None else RouteReason.POLICY)


def _next(names: list[str], *, after: str) -> str | None:
    """The first of the sorted names beyond `after`, around the end."""
    return next((name for name in names if name > after), names[0] if names else None)


def _distinct(*experts: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in experts if name is not None))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
