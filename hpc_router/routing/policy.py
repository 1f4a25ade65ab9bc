"""Policies choose an expert for a request with `model: auto`. Each policy is one small class.

A policy decides at once, from the prompt and from the ready experts with their requests in flight. It must not know
replicas, and it never waits. `select` may return an expert that is not ready; the router then tries the experts of
`order`. `explain` makes the same decision without changing the policy's state.

Reasons of a decision: `low_margin`, `out_of_domain` (the probability that the decision is right is too small) and
`no_known_terms` describe the prompt; the fallback gets it, or without a fallback the best expert. `unavailable`: the
prompt's cluster has no expert in this deployment, or no expert is ready. `policy`: the prompt had no influence. Only
the router sets `named` (the request names the expert), `spilled` (the best expert is busy, so the runner-up gets the
request) and `capability` (the best expert does not accept the request, because of a picture in it, for example).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from hpc_router.errors import ConfigError, suggest
from hpc_router.routing.classifier import Classifier, Term
from hpc_router.routing.confidence import Calibration
from hpc_router.routing.prompt_text import Prompt

KINDS = ("classifier", "least_in_flight", "model_field", "round_robin")


class RouteReason(StrEnum):
    """Why a request goes to its expert (see the module)."""

    __hash__ = str.__hash__  # written in C, while the hash of an enum is Python code

    NAMED = "named"
    CLASSIFIED = "classified"
    POLICY = "policy"
    LOW_MARGIN = "low_margin"
    NO_KNOWN_TERMS = "no_known_terms"
    SPILLED = "spilled"
    UNAVAILABLE = "unavailable"
    OUT_OF_DOMAIN = "out_of_domain"
    CAPABILITY = "capability"


_CLASSIFIED: Final = RouteReason.CLASSIFIED  # a global name is faster than a look-up in the enum


class Decision(NamedTuple):
    """The decision for one prompt. `expert` is None if no expert can take the prompt. `margin`: by how much the
    prompt's score exceeds that of the expert `runner_up`, or of the nearest topic of no expert if that is higher."""

    expert: str | None
    reason: RouteReason
    cluster: str | None = None
    score: float | None = None
    margin: float | None = None
    runner_up: str | None = None

    def to_dict(self, *, id: str | int | None) -> dict[str, object]:
        """Returns the decision as JSON values for `POST /route`, `hpc-router route` and `classify predict`; `id`: the
        prompt's id. The keys must not change, because other programs read them."""
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
    """A decision, and the terms that contributed most to it. `decided_by`: the part of the prompt that decided (see
    `classifier.Reading.part`); None if the prompt had no influence. `topic`: the topic of no expert that is nearer to
    the prompt than the cluster, if there is one."""

    decision: Decision
    terms: tuple[Term, ...] = ()
    decided_by: str | None = None
    topic: str | None = None

    def to_dict(self, *, id: str | int | None) -> dict[str, object]:
        terms = [{"term": term.term, "weight": _rounded(term.weight)} for term in self.terms]
        return {**self.decision.to_dict(id=id), "terms": terms, "decided_by": self.decided_by, "topic": self.topic}


class Policy(Protocol):
    """The interface of a policy."""

    weighs_load: bool
    """Whether `select` uses `ready`. If so, the router needs time in proportion to the number of replicas for each
    decision."""

    @property
    def shadow(self) -> "Policy | None":
        """The shadow: a second policy, whose decisions for the same prompts are only counted. None without one."""

    @property
    def version(self) -> str | None:
        """Returns the version of the policy's artefact; None if the policy has no artefact."""

    def select(self, prompt: Prompt, *, ready: Mapping[str, int]) -> Decision:
        """Chooses an expert for a prompt. `ready`: ready experts and their number of requests in flight."""

    def explain(self, prompt: Prompt, *, ready: Mapping[str, int]) -> Explanation:
        """Returns the decision that `select` would make, and the terms that caused it. Does not change the policy's
        state."""

    def order(self, decision: Decision) -> tuple[str, ...]:
        """Returns the experts to try one after the other: the chosen one, then others in case it is not ready."""

    def limited_to(self, experts: Collection[str]) -> "Policy":
        """Returns a policy that chooses in the same way among these experts only."""


def versions(policy: Policy) -> tuple[str | None, str | None]:
    """Returns the versions of the artefacts of a policy and of its shadow."""
    return policy.version, None if policy.shadow is None else policy.shadow.version


class ClassifierPolicy:
    """A policy that chooses the expert of the prompt's cluster; the fallback if the margin is low or the cluster has no
    expert.

    With `min_confidence`, the margin does not decide: the fallback is chosen if the decision is right with a smaller
    probability than that. Raises ConfigError if the artefact then has no calibration.
    """

    weighs_load = False

    def __init__(
        self,
        classifier: Classifier,
        *,
        fallback: str | None,
        shadow: "Policy | None" = None,
        min_confidence: float | None = None,
    ) -> None:
        self.shadow = shadow
        self.version = classifier.version
        self._classifier = classifier
        self._fallback = fallback
        self._expert_of = dict(zip(classifier.artefact.clusters, classifier.experts, strict=True))
        self._min_confidence = min_confidence
        self._calibration = None if min_confidence is None else _calibration_of(classifier)
        self._min_log_odds = 0.0 if min_confidence is None else _log_odds(min_confidence)
        self._orders: dict[tuple[str | None, str | None, str | None], tuple[str, ...]] = {}

    def select(self, prompt: Prompt, *, ready: Mapping[str, int]) -> Decision:
        cluster, own, score, margin, runner_up, known_terms = self._classifier.classify(prompt)
        best = own or self._fallback or runner_up
        if known_terms == 0:
            # The classifier knows no term of the prompt, so the decision has no cluster, score or margin.
            return Decision(self._fallback or best, RouteReason.NO_KNOWN_TERMS)
        if margin is None:
            expert, reason = (best, RouteReason.UNAVAILABLE) if own is None else (own, _CLASSIFIED)
        elif self._calibration is not None and self._calibration.log_odds(margin, score) < self._min_log_odds:
            expert, reason = self._fallback or best, RouteReason.OUT_OF_DOMAIN
        elif self._calibration is None and margin < self._classifier.margin_threshold:
            expert, reason = self._fallback or best, RouteReason.LOW_MARGIN
        elif own is None:
            expert, reason = best, RouteReason.UNAVAILABLE
        else:
            expert, reason = own, _CLASSIFIED
        return tuple.__new__(Decision, (expert, reason, cluster, score, margin, runner_up))

    def explain(self, prompt: Prompt, *, ready: Mapping[str, int]) -> Explanation:
        decision = self.select(prompt, ready=ready)
        if decision.reason is RouteReason.NO_KNOWN_TERMS:
            return Explanation(decision)
        classifier = self._classifier
        part, topic = classifier.read(prompt).part, classifier.nearest_topic(prompt)
        return Explanation(decision, classifier.explain(prompt), part, topic)

    def order(self, decision: Decision) -> tuple[str, ...]:
        key = decision.expert, decision.cluster, decision.runner_up
        order = self._orders.get(key)
        if order is None:
            best = None if decision.cluster is None else self._expert_of[decision.cluster]
            order = self._orders[key] = _distinct(decision.expert, best, decision.runner_up, self._fallback)
        return order

    def limited_to(self, experts: Collection[str]) -> Policy:
        fallback = self._fallback if self._fallback in experts else None
        if self._classifier.choices.isdisjoint(experts):
            return ModelField(fallback=fallback)
        return ClassifierPolicy(
            self._classifier.limited_to(experts),
            fallback=fallback,
            shadow=None if self.shadow is None else self.shadow.limited_to(experts),
            min_confidence=self._min_confidence,
        )


class RoundRobin:
    """A policy that chooses each ready expert once, in the order of their names, and then begins again. The set of
    ready experts may change between calls."""

    version = None
    weighs_load = True
    shadow = None

    def __init__(self, *, fallback: str | None = None, experts: Collection[str] | None = None) -> None:
        """Creates a policy that chooses only among `experts`; None: among all. `fallback`: tried after the chosen
        expert."""
        self._fallback = fallback
        self._experts = experts
        self._last = ""

    def select(self, prompt: Prompt, *, ready: Mapping[str, int]) -> Decision:
        decision = self.explain(prompt, ready=ready).decision
        self._last = decision.expert or self._last
        return decision

    def explain(self, prompt: Prompt, *, ready: Mapping[str, int]) -> Explanation:
        expert = _next(self._candidates(ready), after=self._last)
        return Explanation(Decision(expert, RouteReason.UNAVAILABLE if expert is None else RouteReason.POLICY))

    def order(self, decision: Decision) -> tuple[str, ...]:
        return _distinct(decision.expert, self._fallback)

    def limited_to(self, experts: Collection[str]) -> Policy:
        return type(self)(fallback=self._fallback if self._fallback in experts else None, experts=experts)

    def _usable(self, ready: Mapping[str, int]) -> Mapping[str, int]:
        experts = self._experts
        return ready if experts is None else {name: count for name, count in ready.items() if name in experts}

    def _candidates(self, ready: Mapping[str, int]) -> list[str]:
        return sorted(self._usable(ready))


class LeastInFlight(RoundRobin):
    """A policy that chooses the ready expert with the fewest requests in flight; among equals, like `RoundRobin`."""

    def _candidates(self, ready: Mapping[str, int]) -> list[str]:
        ready = self._usable(ready)
        least = min(ready.values(), default=0)
        return sorted(name for name, count in ready.items() if count == least)


class ModelField:
    """The policy for clients that always name the expert. A request for `auto` gets the fallback; without a fallback,
    the router responds with 404."""

    version = None
    weighs_load = False
    shadow = None

    def __init__(self, *, fallback: str | None) -> None:
        self._fallback = fallback

    def select(self, prompt: Prompt, *, ready: Mapping[str, int]) -> Decision:
        return Decision(self._fallback, RouteReason.POLICY)

    def explain(self, prompt: Prompt, *, ready: Mapping[str, int]) -> Explanation:
        return Explanation(self.select(prompt, ready=ready))

    def order(self, decision: Decision) -> tuple[str, ...]:
        return _distinct(decision.expert)

    def limited_to(self, experts: Collection[str]) -> Policy:
        return ModelField(fallback=self._fallback if self._fallback in experts else None)


def build_policy(
    *,
    kind: str,
    classifier: Classifier | None = None,
    fallback: str | None = None,
    shadow: Policy | None = None,
    min_confidence: float | None = None,
) -> Policy:
    """Returns the policy of the configured `kind`. Raises ConfigError if that is unknown or needs a missing
    classifier."""
    match kind:
        case "classifier":
            if classifier is None:
                raise ConfigError("policy=classifier: no classifier; give the experts exemplars or set policy.artefact")
            return ClassifierPolicy(classifier, fallback=fallback, shadow=shadow, min_confidence=min_confidence)
        case "round_robin":
            return RoundRobin(fallback=fallback)
        case "least_in_flight":
            return LeastInFlight(fallback=fallback)
        case "model_field":
            return ModelField(fallback=fallback)
        case _:
            raise ConfigError(f"unknown policy '{kind}'{suggest(kind, KINDS)}")


def _calibration_of(classifier: Classifier) -> Calibration:
    calibration = classifier.artefact.calibration
    if calibration is None:
        raise ConfigError(
            f"policy.min_confidence: the artefact {classifier.version} does not know how certain its decisions are; "
            "train it again with method=exemplars or method=discovered, or use policy.margin"
        )
    return calibration


def _log_odds(probability: float) -> float:
    if probability in (0.0, 1.0):
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability / (1 - probability))


def _next(names: list[str], *, after: str) -> str | None:
    """Returns the first of the sorted `names` that comes after the name `after`; the first name if none does; None if
    there are no names."""
    return next((name for name in names if name > after), names[0] if names else None)


def _distinct(*experts: str | None) -> tuple[str, ...]:
    """Returns the experts without None and without duplicates, in order."""
    return tuple(dict.fromkeys(name for name in experts if name is not None))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
