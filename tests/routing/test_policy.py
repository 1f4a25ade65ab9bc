"""The chosen expert, the reason and the order of substitutes under each policy."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.errors import ConfigError
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.confidence import Calibration
from hpc_router.routing.policy import KINDS, Decision, Policy, RouteReason, build_policy
from tests.routing.samples import EXPLANATION_KEYS, artefact, soft_artefact

READY = {"code": 0, "general": 0, "math": 0, "medicine": 0}
MATHS = "Solve the equation 3x + 4 = 10 and prove it"


def by_classifier(
    *, fallback: str | None = "general", threshold: float = 0.0, experts: set[str] | None = None
) -> Policy:
    trained = dataclasses.replace(artefact(), margin_threshold=threshold)
    return build_policy(kind="classifier", classifier=Classifier(trained, experts=experts), fallback=fallback)


def test_a_clear_prompt_goes_to_its_expert() -> None:
    policy = by_classifier()
    decision = policy.select(MATHS, ready=READY)
    assert (decision.expert, decision.cluster, decision.reason) == ("math", "math", RouteReason.CLASSIFIED)
    assert decision.score is not None
    assert decision.margin is not None
    assert 0 < decision.margin <= decision.score <= 1
    assert policy.order(decision) == ("math", decision.runner_up, "general")


def test_the_classifier_ignores_readiness() -> None:
    """The router checks which experts are ready and tries the next in order."""
    assert by_classifier().select(MATHS, ready={}).expert == "math"


def test_a_low_margin_goes_to_the_fallback_and_still_names_the_cluster() -> None:
    policy = by_classifier(threshold=2.0)
    decision = policy.select(MATHS, ready=READY)
    assert (decision.expert, decision.cluster, decision.reason) == ("general", "math", RouteReason.LOW_MARGIN)
    assert policy.order(decision) == ("general", "math", decision.runner_up)


def test_a_margin_at_the_threshold_is_enough() -> None:
    margin = by_classifier().select(MATHS, ready=READY).margin
    assert margin is not None
    assert by_classifier(threshold=margin).select(MATHS, ready=READY).reason is RouteReason.CLASSIFIED


def test_a_low_margin_without_fallback_goes_to_the_best_expert() -> None:
    decision = by_classifier(threshold=2.0, fallback=None).select(MATHS, ready=READY)
    assert (decision.expert, decision.reason) == ("math", RouteReason.LOW_MARGIN)


@pytest.mark.parametrize("text", ["", "Привет", "\ud800"])
def test_without_known_terms_no_cluster_is_reported(text: str) -> None:
    policy = by_classifier()
    assert policy.select(text, ready=READY) == Decision("general", RouteReason.NO_KNOWN_TERMS)
    assert policy.order(Decision("general", RouteReason.NO_KNOWN_TERMS)) == ("general",)


def test_without_known_terms_or_fallback_some_expert_is_chosen() -> None:
    decision = by_classifier(fallback=None).select("Привет", ready=READY)
    assert decision.expert in {"code", "math", "medicine"}
    assert decision.reason is RouteReason.NO_KNOWN_TERMS


def test_a_cluster_without_expert_goes_to_the_fallback() -> None:
    policy = by_classifier(experts={"code", "medicine"})
    decision = policy.select(MATHS, ready=READY)
    assert (decision.expert, decision.cluster, decision.reason) == ("general", "math", RouteReason.UNAVAILABLE)
    assert policy.order(decision) == ("general", decision.runner_up)


def test_a_cluster_without_expert_or_fallback_goes_to_the_runner_up() -> None:
    decision = by_classifier(experts={"code", "medicine"}, fallback=None).select(MATHS, ready=READY)
    assert decision.expert == decision.runner_up
    assert decision.expert in {"code", "medicine"}


def test_without_any_expert_none_is_chosen() -> None:
    policy = by_classifier(experts=set(), fallback=None)
    decision = policy.select(MATHS, ready=READY)
    assert (decision.expert, decision.reason) == (None, RouteReason.UNAVAILABLE)
    assert policy.order(decision) == ()


def test_the_fallback_can_be_an_expert_with_exemplars() -> None:
    policy = by_classifier(fallback="math")
    assert policy.order(policy.select(MATHS, ready=READY))[0] == "math"
    assert len(policy.order(policy.select(MATHS, ready=READY))) == 2


def test_round_robin_takes_turns_by_name() -> None:
    policy = build_policy(kind="round_robin", fallback="general")
    chosen = [policy.select("x", ready=READY).expert for _ in range(5)]
    assert chosen == ["code", "general", "math", "medicine", "code"]
    assert policy.select("x", ready={"code": 0, "medicine": 0}).expert == "medicine"
    assert policy.select("x", ready={"code": 0, "medicine": 0}).expert == "code"
    assert policy.order(Decision("code", RouteReason.POLICY)) == ("code", "general")


def test_least_in_flight_chooses_the_least_loaded_and_breaks_ties_in_turn() -> None:
    policy = build_policy(kind="least_in_flight")
    assert policy.select("x", ready={"a": 2, "b": 1, "c": 3}).expert == "b"
    chosen = [policy.select("x", ready={"a": 1, "b": 5, "c": 1}).expert for _ in range(3)]
    assert chosen == ["c", "a", "c"]


@pytest.mark.parametrize("kind", ["round_robin", "least_in_flight"])
def test_without_ready_experts_none_is_chosen(kind: str) -> None:
    policy = build_policy(kind=kind, fallback="general")
    assert policy.select("x", ready={}) == Decision(None, RouteReason.UNAVAILABLE)


def test_model_field_gives_auto_to_the_fallback_or_to_no_expert() -> None:
    policy = build_policy(kind="model_field", fallback="general")
    assert policy.select(MATHS, ready=READY) == Decision("general", RouteReason.POLICY)
    assert policy.order(policy.select(MATHS, ready=READY)) == ("general",)
    assert build_policy(kind="model_field").select(MATHS, ready=READY) == Decision(None, RouteReason.POLICY)


@pytest.mark.parametrize("kind", KINDS)
def test_explaining_changes_no_state(kind: str) -> None:
    policy = build_policy(kind=kind, classifier=Classifier(artefact()), fallback="general")
    first = policy.explain(MATHS, ready=READY)
    assert policy.explain(MATHS, ready=READY) == first
    assert policy.select(MATHS, ready=READY) == first.decision
    assert (policy.version is not None) == (kind == "classifier")


def test_the_explanation_has_the_keys_of_the_contract() -> None:
    """`POST /route` returns id, cluster, expert, score, margin, runner_up and reason, plus the terms."""
    shown = by_classifier().explain(MATHS, ready=READY).to_dict(id="req-1")
    assert list(shown) == EXPLANATION_KEYS
    assert (shown["id"], shown["reason"], type(shown["reason"])) == ("req-1", "classified", str)
    terms = shown["terms"]
    assert isinstance(terms, list)
    assert terms[0].keys() == {"term", "weight"}
    assert by_classifier().explain("Привет", ready=READY).to_dict(id=0)["terms"] == []


def test_the_reasons_are_those_of_the_contract() -> None:
    contract = "named classified policy low_margin no_known_terms spilled unavailable out_of_domain capability"
    assert " ".join(RouteReason) == contract


def test_an_unknown_policy_or_a_missing_classifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'round_robin'"):
        build_policy(kind="round-robin")
    with pytest.raises(ConfigError, match=r"policy\.artefact"):
        build_policy(kind="classifier", fallback="general")


@settings(deadline=None)
@given(
    st.text(st.characters(), max_size=50) | st.sampled_from([MATHS, "symptoms", "python function"]),
    st.sampled_from([None, "general", "math"]),
    st.sets(st.sampled_from(["code", "math", "medicine"])),
    st.sampled_from([0.0, 0.1, 2.0]),
)
def test_the_order_starts_with_the_choice_and_has_no_duplicates(
    text: str, fallback: str | None, experts: set[str], threshold: float
) -> None:
    policy = by_classifier(fallback=fallback, experts=experts, threshold=threshold)
    decision = policy.select(text, ready=READY)
    order = policy.order(decision)
    assert len(set(order)) == len(order)
    assert set(order) <= experts | ({fallback} - {None})
    assert order[:1] == (() if decision.expert is None else (decision.expert,))
    assert (decision.expert is None) == (not experts and fallback is None)


def by_confidence(min_confidence: float, *, calibrated: bool = True) -> Policy:
    calibration = Calibration(bias=-2.0, by_margin=20.0, by_score=0.0) if calibrated else None
    trained = dataclasses.replace(artefact(), margin_threshold=1.0, calibration=calibration)
    return build_policy(
        kind="classifier", classifier=Classifier(trained), fallback="general", min_confidence=min_confidence
    )


def test_a_decision_that_is_probably_wrong_goes_to_the_fallback() -> None:
    """The confidence replaces the margin threshold, which no margin reaches here."""
    certain = by_confidence(0.5).select(MATHS, ready=READY)
    assert (certain.expert, certain.reason) == ("math", RouteReason.CLASSIFIED)
    assert certain.margin is not None
    probability = Calibration(bias=-2.0, by_margin=20.0, by_score=0.0).probability(certain.margin, 0.0)
    below, above = (by_confidence(probability + d).select(MATHS, ready=READY) for d in (-1e-6, 1e-6))
    assert below.reason is RouteReason.CLASSIFIED
    assert (above.expert, above.cluster, above.reason) == ("general", "math", RouteReason.OUT_OF_DOMAIN)
    assert by_confidence(0.0).select(MATHS, ready=READY).reason is RouteReason.CLASSIFIED
    assert by_confidence(1.0).select(MATHS, ready=READY).reason is RouteReason.OUT_OF_DOMAIN


def test_an_artefact_without_calibration_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy\.min_confidence: the artefact .* does not know how certain"):
        by_confidence(0.5, calibrated=False)


@pytest.mark.parametrize("text", ["Что это (пример)?", "(1) [2] {3}!", "17 + 4 = ?"])
def test_brackets_and_digits_alone_are_no_known_terms(text: str) -> None:
    """The exemplars of `code` have brackets and those of `math` have digits, but neither shows the topic."""
    assert by_classifier().select(text, ready=READY).reason is RouteReason.NO_KNOWN_TERMS


@settings(deadline=None)
@given(
    st.text(st.characters(), max_size=50) | st.sampled_from([MATHS, "symptoms", "python function"]),
    st.sets(st.sampled_from(["code", "general", "math", "medicine"])),
    st.sampled_from(["table", "soft"]),
)
def test_a_policy_limited_to_experts_names_no_other(text: str, allowed: set[str], kind: str) -> None:
    """Neither as the choice nor as a substitute."""
    trained = artefact() if kind == "table" else soft_artefact(names=("math", "medicine"))
    policy = build_policy(kind="classifier", classifier=Classifier(trained), fallback="general").limited_to(allowed)
    decision = policy.select(text, ready=READY)
    assert {decision.expert, decision.runner_up} - {None} <= allowed
    assert set(policy.order(decision)) <= allowed


def test_a_limited_policy_keeps_its_minimum_confidence() -> None:
    limited = by_confidence(1.0).limited_to({"math", "code", "general"})
    assert limited.select(MATHS, ready=READY).reason is RouteReason.OUT_OF_DOMAIN
