"""Evaluation figures and rebalancing, on cases small enough to compute by hand."""

import numpy as np
import pytest

from hpc_router.routing import evaluation
from hpc_router.routing.rebalancing import rebalance


def test_clusters_are_named_by_their_most_frequent_label() -> None:
    assert evaluation.majority(["a", "a", "a", "b"], ["x", "y", "y", "x"]) == {"a": "y", "b": "x"}
    assert evaluation.majority(["a", "a"], ["y", "x"]) == {"a": "x"}


def test_nmi_is_one_for_equal_and_zero_for_independent_partitions() -> None:
    assert evaluation.nmi(["a", "a", "b", "b"], ["y", "y", "x", "x"]) == pytest.approx(1)
    assert evaluation.nmi(["a", "b", "a", "b"], ["x", "x", "y", "y"]) == pytest.approx(0)
    assert evaluation.nmi(["a", "a"], ["x", "x"]) == 0


def test_the_balance_efficiency_of_equal_shares_is_one() -> None:
    assert evaluation.balance(["a", "b"], ["a", "b"]) == ({"a": 0.5, "b": 0.5}, 1.0)
    assert evaluation.balance(["a", "a", "a", "b"], ["a", "b"])[1] == pytest.approx(1 / 1.5)


def test_coverage_counts_prompts_above_a_margin() -> None:
    rows = evaluation.coverage([0.1, 0.3, None, 0.05], [True, True, True, False], threshold=0.1)
    assert (rows[0]["coverage"], rows[0]["accuracy"]) == (1.0, 0.75)
    assert (rows[2]["coverage"], rows[2]["accuracy"]) == (0.75, 1.0)


def test_a_known_gain_beats_random_mixing_and_the_oracle_bounds_it() -> None:
    right = np.array([[1.0, 1.0], [0.0, 1.0]] * 100)  # every second prompt needs the expensive expert
    known = np.array([0.0, 1.0] * 100)
    result = evaluation.cost_quality(experts=["cheap", "expensive"], cost=np.array([0.0, 1.0]), gain=known, right=right)
    assert result["single"] == {"cheap": 0.5, "expensive": 1.0}
    assert result["above_random_mixing"]["low"] > 0
    for row in result["curve"]:
        assert row["low"] < row["accuracy"] - row["random"] < row["high"]
        assert row["accuracy"] == pytest.approx(row["oracle"])
        assert row["random"] <= row["accuracy"]
    blind = evaluation.cost_quality(
        experts=["cheap", "expensive"], cost=np.array([0.0, 1.0]), gain=np.zeros(200), right=right
    )
    assert blind["above_random_mixing"]["low"] < 0.02
    assert abs(blind["above_random_mixing"]["mean"]) < 0.05


def rebalanced(*, limit: float, max_loss: float = 1.0) -> tuple[tuple[str, ...], float, dict[str, int]]:
    """Rebalance three clusters at `a` and one at `b`; moving the second one costs the least."""
    result = rebalance(
        ["a", "a", "a", "b"],
        clusters=["c0", "c1", "c2", "c3"],
        load=np.array([0.3, 0.2, 0.2, 0.3]),
        score=np.array([[1, 0], [0.9, 0.8], [0.9, 0.2], [0, 1]]),
        capacity={"a": 0.5, "b": 0.5},
        limit=limit,
        max_loss=max_loss,
    )
    return result.table, result.loss, dict(result.replicas)


def test_the_cheapest_sufficient_move_is_made() -> None:
    table, loss, replicas = rebalanced(limit=1.0)
    assert table == ("a", "b", "a", "b")
    assert loss == pytest.approx(0.02)
    assert not replicas


def test_no_move_within_the_limit_and_replicas_instead_of_a_move_beyond_the_loss() -> None:
    assert rebalanced(limit=1.4)[0] == ("a", "a", "a", "b")
    assert rebalanced(limit=1.0, max_loss=0.01)[::2] == (("a", "a", "a", "b"), {"a": 2})
