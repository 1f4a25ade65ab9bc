"""Decides which fault applies to which request, by rules and their counters. Random numbers are seeded. No I/O.

Rules are tried in order. The factors of all matching `slow` rules are multiplied. The first other rule that matches
decides the fault, and later rules are not tried for that request. A rule whose fault is impossible for a request (such
as `cut` for a response that is not a stream) does not match it and is not counted as used.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hpc_router.errors import ConfigError
from hpc_router.sim.faults import CONNECT, EXPRESSIBLE, Fault, FaultKind, ResponseForm, Rule, parse_rules


@dataclass(slots=True)
class _ActiveRule:
    """A rule, its random numbers, and how often it was tried and applied."""

    rule: Rule
    rng: random.Random
    seen: int = 0
    hits: int = 0

    def hits_next(self) -> bool:
        rule = self.rule
        self.seen += 1
        if self.seen % rule.every or (rule.times is not None and self.hits >= rule.times):
            return False
        if self.rng.random() >= rule.probability:
            return False
        self.hits += 1
        return True


class FaultSchedule:
    """The active rules and their counters."""

    def __init__(self, rules: Sequence[Rule], *, seed: int) -> None:
        self._seed = seed
        self.replace(rules)

    def replace(self, rules: Sequence[Rule]) -> None:
        self._active = [
            _ActiveRule(rule=rule, rng=random.Random(f"{self._seed}/{index}"))
            for index, rule in enumerate(rules)
            if rule.fault.kind is not FaultKind.LOAD_FAIL
        ]

    def load(self, rules: object) -> None:
        """Replaces the rules by those in a JSON list, given as text or decoded. Tests and `POST /sim/faults` call
        this."""
        parsed = parse_rules(rules)
        if any(rule.fault.kind is FaultKind.LOAD_FAIL for rule in parsed):
            raise ConfigError("load_fail is injected at the start only: give it to --faults")
        self.replace(parsed)

    def describe(self) -> list[dict[str, object]]:
        """Returns the rules with their counters, as JSON values."""
        return [{**active.rule.source, "seen": active.seen, "hits": active.hits} for active in self._active]

    def at_connect(self) -> bool:
        """Returns whether a rule says that the connection which was just accepted is reset."""
        return any(active.hits_next() for active in self._active if active.rule.fault.at == CONNECT)

    def select(self, path: str, *, model: str | None, answer: ResponseForm) -> tuple[float, Fault | None]:
        """Returns the factor by which this request is slowed down, and the fault that it gets or None. `answer`: the
        form of its response, in which only some faults are possible."""
        factor = 1.0
        for active in self._active:
            if not _matches(active.rule, path=path, model=model, answer=answer) or not active.hits_next():
                continue
            if active.rule.fault.kind is not FaultKind.SLOW:
                return factor, active.rule.fault
            factor *= active.rule.fault.factor
        return factor, None


def _matches(rule: Rule, *, path: str, model: str | None, answer: ResponseForm) -> bool:
    if rule.fault.at == CONNECT or rule.fault.kind not in EXPRESSIBLE[answer]:
        return False
    if rule.path is None and answer is ResponseForm.OTHER:
        return False
    return rule.path in (None, path) and rule.model in (None, model)
