"""Power of two choices, and rendezvous hashing. No I/O.

The less loaded of two random replicas spreads load nearly as well as the least loaded of all, and workers that decide
on slightly old counts do not all choose the same replica. Rendezvous hashing orders the replicas by a key; all workers
get the same order, and when a replica is added or removed, only the keys of that replica move. Nothing here knows
requests or experts.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from random import Random
from typing import Final, Protocol, TypeVar

SLOTS: Final = 4096
"""Number of slots that keys are hashed to. The order of replicas is computed once per slot."""


class Loaded(Protocol):
    """The properties of a replica that this module uses: its load, and a number that grows with each use."""

    last_used: int

    @property
    def load(self) -> int: ...


R = TypeVar("R", bound=Loaded)


def power_of_two_choices(replicas: Sequence[R], *, fits: Callable[[R], bool], random: Random) -> R | None:
    """Returns the less loaded of two random replicas for which `fits` is true, and at equal load the least recently
    used one. Returns None if no replica fits. `replicas` is not empty."""
    count = len(replicas)
    first = int(random.random() * count)
    second = (first + 1 + int(random.random() * (count - 1))) % count
    a, b = replicas[first], replicas[second]
    if not (fits(a) and fits(b)):  # draw again, from the replicas that fit
        fitting = [replica for replica in replicas if fits(replica)]
        if len(fitting) > 2:
            fitting = random.sample(fitting, 2)
        if not fitting:
            return None
        a, b = fitting[0], fitting[-1]
    return a if (a.load, a.last_used) <= (b.load, b.last_used) else b


def rendezvous(names: Sequence[str], slot: int) -> list[int]:
    """Returns the indices of `names` in order of preference for this slot (highest random weight first)."""
    weights = [blake2b(b"%d %b" % (slot, name.encode()), digest_size=8).digest() for name in names]
    return sorted(range(len(names)), key=weights.__getitem__, reverse=True)
