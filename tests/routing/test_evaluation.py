"""The figures of an evaluation, on cases small enough to be reckoned by hand."""

import numpy as np
import pytest

from hpc_router.routing import evaluation
from hpc_router.routing.rebalancing import pack


def test_clusters_are_named_by_their_commonest_label() -> None:
    assert evaluation.majority(["a", "a", "a", "b"], ["x", "y", "y", "x"]) == {"a": "y", "b": "x"}
    assert evaluation.majority(["a", "a"], ["y", "x"]) == {"a": "x"}


def test_nmi_is_one_for_the_same_parts_and_nothing_for_unrelated_ones() -> None:
    assert evaluation.nmi(["a", "a", "b", "b"], ["y", "y", "x", "x"]) == pytest.approx(1)
    assert evaluation.nmi(["a", "b", "a", "b"], ["x", "x", "y", "y"]) == pytest.approx(0)
    assert evaluation.nmi(["a", "a"], ["x", "x"]) == 0


def test_balance_is_one_when_all_have_the_same() -> None:
    assert evaluation.balance(["a", "b"], ["a", "b"]) == ({"a": 0.5, "b": 0.5}, 1.0)
    assert evaluation.balance(["a", "a", "a", "b"], ["a", "b"])[1] == pytest.approx(1 / 1.5)


def test_coverage_counts_what_lies_above_a_margin() -> None:
    rows = evaluation.coverage([0.1, 0.3, None, 0.05], [True, True, True, False], threshold=0.1)
    assert (rows[0]["coverage"], rows[0]["accuracy"]) == (1.0, 0.75)
    assert (rows[2]["coverage"], rows[2]["accuracy"]) == (0.75, 1.0)


def test_a_gain_that_is_known_beats_random_mixing_and_the_oracle_bounds_it() -> None:
    right = np.array([[1.0, 1.0], [0.0, 1.0]] * 100)  # every other prompt needs the dear one
    known = np.array([0.0, 1.0] * 100)
    found = evaluation.cost_quality(experts=["cheap", "dear"], cost=np.array([0.0, 1.0]), gain=known, right=right)
    assert found["single"] == {"cheap": 0.5, "dear": 1.0}
    assert found["above_random_mixing"]["low"] > 0
    for row in found["curve"]:
        assert row["low"] < row["accuracy"] - row["random"] < row["high"]
        assert row["accuracy"] == pytest.approx(row["oracle"])
        assert row["random"] <= row["accuracy"]
    blind = evaluation.cost_quality(
        experts=["cheap", "dear"], cost=np.array([0.0, 1.0]), gain=np.zeros(200), right=right
    )
    assert blind["above_random_mixing"]["low"] < 0.02
    assert abs(blind["above_random_mixing"]["mean"]) < 0.05


def packed(*, limit: float, most_loss: float = 1.0) -> tuple[tuple[str, ...], float, dict[str, int]]:
    """Three clusters at `a`, one at `b`; the second loses least elsewhere."""
    found = pack(
        ["a", "a", "a", "b"],
        clusters=["c0", "c1", "c2", "c3"],
        load=np.array([0.3, 0.2, 0.2, 0.3]),
        score=np.array([[1, 0], [0.9, 0.8], [0.9, 0.2], [0, 1]]),
        capacity={"a": 0.5, "b": 0.5},
        limit=limit,
        most_loss=most_loss,
    )
    return found.table, found.loss, dict(found.replicas)


def test_the_cheapest_move_that_is_enough_is_made() -> None:
    table, loss, replicas = packed(limit=1.0)
    assert table == ("a", "b", "a", "b")
    assert loss == pytest.approx(0.02)
    assert not replicas


def test_who_fits_is_left_alone_and_too_dear_a_move_asks_for_replicas() -> None:
    assert packed(limit=1.4)[0] == ("a", "a", "a", "b")
    assert packed(limit=1.0, most_loss=0.01)[::2] == (("a", "a", "a", "b"), {"a": 2})
