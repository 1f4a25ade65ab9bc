"""Balance decides alike in every process, and within its bounds."""

from dataclasses import dataclass
from random import Random

import pytest

from hpc_router.router.balance import lighter_of_two, load_bound, pinned, rendezvous, slot_of


@dataclass
class Server:
    load: int
    last_used: int = 0


def idle(server: Server) -> bool:
    return server.load < 10


def test_of_two_the_lighter_one_and_of_equals_the_one_not_used_for_longest() -> None:
    heavy, light, old = Server(2), Server(1, last_used=5), Server(1, last_used=3)
    for seed in range(20):
        assert lighter_of_two([heavy, light], fits=idle, random=Random(seed)) is light
        assert lighter_of_two([light, old], fits=idle, random=Random(seed)) is old


def test_the_heaviest_of_many_is_never_drawn_and_all_others_are() -> None:
    servers = [Server(load) for load in range(5)]
    random = Random(1)
    drawn = {id(lighter_of_two(servers, fits=idle, random=random)) for _ in range(500)}
    assert drawn == {id(server) for server in servers[:-1]}


def test_who_does_not_fit_is_passed_over() -> None:
    full, light = Server(10), Server(9)
    for seed in range(20):
        assert lighter_of_two([full, full, light, full], fits=idle, random=Random(seed)) is light
        assert lighter_of_two([full], fits=idle, random=Random(seed)) is None


@pytest.mark.parametrize(
    ("total", "replicas", "factor", "bound"), [(0, 2, 1.25, 1), (3, 2, 1.25, 3), (7, 4, 1.0, 2), (9, 0, 1.25, 13)]
)
def test_the_bound_is_the_share_of_one_request_more_rounded_up(
    total: int, replicas: int, factor: float, bound: int
) -> None:
    assert load_bound(total=total, replicas=replicas, factor=factor) == bound


def test_a_pin_goes_to_the_first_under_the_bound() -> None:
    order = [Server(3), Server(2), Server(0)]
    assert pinned(order, fits=idle, bound=4) is order[0]
    assert pinned(order, fits=idle, bound=3) is order[1]
    assert pinned(order, fits=idle, bound=0) is None


def test_every_worker_has_the_same_order() -> None:
    """Whatever its hash seed: the figures are part of what workers agree on."""
    assert [rendezvous(["math-0", "math-1", "math-2"], slot) for slot in range(4)] == [
        [2, 0, 1],
        [1, 2, 0],
        [1, 2, 0],
        [1, 0, 2],
    ]
    assert (slot_of(b"session-1"), slot_of("Grüße".encode())) == (3630, 113)
