"""Power of two choices, and an order that is the same in every process."""

from dataclasses import dataclass
from random import Random

from hpc_router.router.replicas.balancing import power_of_two_choices, rendezvous


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


def test_every_worker_has_the_same_order() -> None:
    """Whatever its hash seed: the figures are part of what workers agree on."""
    assert [rendezvous(["math-0", "math-1", "math-2"], slot) for slot in range(4)] == [
        [2, 0, 1],
        [1, 2, 0],
        [1, 2, 0],
        [1, 0, 2],
    ]
