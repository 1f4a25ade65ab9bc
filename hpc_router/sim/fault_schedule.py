"""Which fault strikes which request: the rules in force and their counters. Seeded, no I/O.

Rules are asked in their order; every `slow` that hits multiplies, the first other fault that hits is the one that
strikes, and the rules after it do not see that request. A fault that a request cannot express (a `cut` on an answer
that is not a stream) does not match it and is not used up.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hpc_router.errors import ConfigError
from hpc_router.sim.faults import CONNECT, EXPRESSIBLE, Fault, FaultKind, ResponseForm, Rule, parse_rules


@dataclass(slots=True)
class _Live:
    rule: Rule
    rng: random.Random
    seen: int = 0
    hits: int = 0

    def strikes(self) -> bool:
        rule = self.rule
        self.seen += 1
        if self.seen % rule.every or (rule.times is not None and self.hits >= rule.times):
            return False
        if self.rng.random() >= rule.probability:
            return False
        self.hits += 1
        return True


class FaultScript:
    """The rules in force and how often each was seen and struck."""

    def __init__(self, rules: Sequence[Rule], *, seed: int) -> None:
        self._seed = seed
        self.replace(rules)

    def replace(self, rules: Sequence[Rule]) -> None:
        self._live = [
            _Live(rule=rule, rng=random.Random(f"{self._seed}/{index}"))
            for index, rule in enumerate(rules)
            if rule.fault.kind is not FaultKind.LOAD_FAIL
        ]

    def load(self, rules: object) -> None:
        """Replace the script by a JSON list, already decoded: what tests and `POST /sim/faults` use."""
        parsed = parse_rules(rules)
        if any(rule.fault.kind is FaultKind.LOAD_FAIL for rule in parsed):
            raise ConfigError("load_fail strikes at the start only: give it to --faults")
        self.replace(parsed)

    def describe(self) -> list[dict[str, object]]:
        return [{**live.rule.source, "seen": live.seen, "hits": live.hits} for live in self._live]

    def at_connect(self) -> bool:
        """Whether the connection just accepted is to be reset."""
        return any(live.strikes() for live in self._live if live.rule.fault.at == CONNECT)

    def select(self, path: str, *, model: str | None, answer: ResponseForm) -> tuple[float, Fault | None]:
        """The slowness factor and the fault that strikes this request."""
        factor = 1.0
        for live in self._live:
            if not _matches(live.rule, path=path, model=model, answer=answer) or not live.strikes():
                continue
            if live.rule.fault.kind is not FaultKind.SLOW:
                return factor, live.rule.fault
            factor *= live.rule.fault.factor
        return factor, None


def _matches(rule: Rule, *, path: str, model: str | None, answer: ResponseForm) -> bool:
    if rule.fault.at == CONNECT or rule.fault.kind not in EXPRESSIBLE[answer]:
        return False
    if rule.path is None and answer is ResponseForm.OTHER:
        return False
    return rule.path in (None, path) and rule.model in (None, model)
