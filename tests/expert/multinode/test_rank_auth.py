"""Which reports and orders a rank accepts."""

from dataclasses import replace
from typing import Any

import pytest

from hpc_router.expert.multinode.rank_auth import is_proven, proof, rank_key, report_token
from hpc_router.net.auth import challenge_answer, replica_key
from hpc_router.net.protocol import Action, RankOrder

KEY = rank_key("secret", "aa")
ORDER = RankOrder(Action.RUN, 3, "10.0.0.1", 4000)
PROVEN = replace(ORDER, proof=proof(KEY, "c", ORDER))


def test_an_order_is_proven_to_the_rank_that_asked() -> None:
    assert is_proven(KEY, "c", PROVEN)
    assert not is_proven(KEY, "d", PROVEN)
    assert not is_proven(rank_key("secret", "bb"), "c", PROVEN)
    assert not is_proven(KEY, "c", ORDER)


@pytest.mark.parametrize(
    "change", [{"action": Action.STOP}, {"attempt": 4}, {"master_address": "10.0.0.2"}, {"master_port": 4001}]
)
def test_no_field_of_an_order_can_be_changed(change: dict[str, Any]) -> None:
    assert not is_proven(KEY, "c", replace(PROVEN, **change))


def test_neither_the_open_challenge_nor_a_report_gives_the_key_away() -> None:
    """`/health` answers any challenge with the replica's key."""
    of_replica = replica_key("secret", "aa")
    assert len({KEY, of_replica, report_token(KEY), challenge_answer(of_replica, "report")}) == 4
