"""Balance decides alike in every process, and within its bounds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest

from hpc_router.config.schema import RouterConfig
from hpc_router.router.replicas.balancing import affinity, affinity_slot, load_bound, power_of_two_choices, rendezvous
from hpc_router.router.replicas.replica import Reservation
from hpc_router.router.replicas.table import ReplicaTable
from tests.router.support import replica


@dataclass
class Server:
    load: int
    last_used: int = 0


def idle(server: Server) -> bool:
    return server.load < 10


def test_the_less_loaded_of_two_and_at_equal_load_the_least_recently_used() -> None:
    heavy, light, old = Server(2), Server(1, last_used=5), Server(1, last_used=3)
    for seed in range(20):
        assert power_of_two_choices([heavy, light], fits=idle, random=Random(seed)) is light
        assert power_of_two_choices([light, old], fits=idle, random=Random(seed)) is old


def test_the_heaviest_of_many_is_never_drawn_and_all_others_are() -> None:
    servers = [Server(load) for load in range(5)]
    random = Random(1)
    drawn = {id(power_of_two_choices(servers, fits=idle, random=random)) for _ in range(500)}
    assert drawn == {id(server) for server in servers[:-1]}


def test_replicas_that_do_not_fit_are_not_chosen() -> None:
    full, light = Server(10), Server(9)
    for seed in range(20):
        assert power_of_two_choices([full, full, light, full], fits=idle, random=Random(seed)) is light
        assert power_of_two_choices([full], fits=idle, random=Random(seed)) is None


@pytest.mark.parametrize(
    ("total", "replicas", "factor", "bound"), [(0, 2, 1.25, 1), (3, 2, 1.25, 3), (7, 4, 1.0, 2), (9, 0, 1.25, 13)]
)
def test_the_bound_is_the_share_of_one_request_more_rounded_up(
    total: int, replicas: int, factor: float, bound: int
) -> None:
    assert load_bound(total=total, replicas=replicas, factor=factor) == bound


def test_affinity_chooses_the_first_below_the_bound() -> None:
    order = [Server(3), Server(2), Server(0)]
    assert affinity(order, fits=idle, bound=4) is order[0]
    assert affinity(order, fits=idle, bound=3) is order[1]
    assert affinity(order, fits=idle, bound=0) is None


def test_every_worker_has_the_same_order() -> None:
    """Whatever its hash seed: the figures are part of what workers agree on."""
    assert [rendezvous(["math-0", "math-1", "math-2"], slot) for slot in range(4)] == [
        [2, 0, 1],
        [1, 2, 0],
        [1, 2, 0],
        [1, 0, 2],
    ]
    assert (affinity_slot(b"session-1"), affinity_slot("Grüße".encode())) == (3630, 113)


def jain(counts: Sequence[int]) -> float:
    return sum(counts) ** 2 / (len(counts) * sum(n * n for n in counts))


def test_a_thousand_users_load_the_replicas_of_each_expert_alike() -> None:
    """Conversations of several turns over 8 experts with two replicas each: by what is in flight and what was served,
    Jain's index is 0.99; and a turn leaves the replica of its conversation only where that is at its bound."""
    random = Random(5)
    bound = RouterConfig().pin_bound
    assert bound is not None
    table = ReplicaTable(bound)
    experts = [f"e{n}" for n in range(8)]
    for expert in experts:
        for n in range(2):
            table.put(replica(f"{expert}-{n}.g1", experts=(expert,), capacity=1000))
    served: Counter[str] = Counter()
    under_way: list[tuple[int, Reservation]] = []
    moved = 0
    for turn in range(8000):
        user = turn if turn < 1000 else 0
        if turn >= 1000:  # somebody has his answer, and says the next thing; every fifth time in another conversation
            at = int(random.random() * len(under_way))
            under_way[at], under_way[-1] = under_way[-1], under_way[at]
            user, hold = under_way.pop()
            hold.release()
            user += 1000 if random.random() < 0.2 else 0
        expert = experts[user % 8]
        slot = affinity_slot(b"user %d" % user)
        home = table.of(expert)[rendezvous([r.slot_name for r in table.of(expert)], slot)[0]]
        total = sum(r.load for r in table.of(expert))
        picked = table.acquire([expert], affinity_slot=lambda slot=slot: slot)  # type: ignore[misc]
        assert picked is not None
        if picked.replica is not home:
            moved += 1
            assert home.load >= load_bound(total=total, replicas=2, factor=bound)
        served[picked.replica.name] += 1
        under_way.append((user, picked))
        if turn >= 1000:
            assert jain([r.load for r in table.of(expert)]) >= 0.988  # 0.99 but for rounding up
    for expert in experts:
        assert jain([served[f"{expert}-{n}.g1"] for n in range(2)]) >= 0.99
    assert moved < 0.1 * 8000
