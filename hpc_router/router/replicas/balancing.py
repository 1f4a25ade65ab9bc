"""Chooses the replica of an expert for a request: by power of two choices, or by the affinity of its conversation. No
I/O.

The less loaded of two random replicas spreads load nearly as well as the least loaded of all, and workers that decide
on slightly old counts do not all choose the same replica.

Affinity sends a conversation to the replica that rendezvous hashing chooses, so that the engine's prefix cache stays
warm without a table of conversations. When a replica is added or removed, only the conversations of that replica move.
A replica with more than its share of the load loses affinity. Nothing here knows requests or experts.
"""

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from random import Random
from typing import Final, Protocol, TypeVar
from zlib import crc32

SLOTS: Final = 4096
"""Number of affinity slots that conversations are hashed to. The order of replicas is computed once per slot."""
KEY_CHARS: Final = 2048
"""Length in characters of the prefix of a conversation's first message that is hashed."""


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


def affinity(order: Sequence[R], *, fits: Callable[[R], bool], bound: float) -> R | None:
    """Returns the first replica, in the rendezvous order `order`, that fits and whose load is below `bound`; None if
    there is none."""
    return next((replica for replica in order if fits(replica) and replica.load < bound), None)


def load_bound(*, total: int, replicas: int, factor: float) -> int:
    """Returns `factor` times the average load that `replicas` replicas with `total` requests in flight have after one
    more request, rounded up."""
    return math.ceil(factor * (total + 1) / max(1, replicas))


def affinity_slot(key: bytes) -> int:
    """Returns the affinity slot for the key of a conversation. It is the same in every process."""
    return crc32(key) % SLOTS


def rendezvous(names: Sequence[str], slot: int) -> list[int]:
    """Returns the indices of `names` in order of preference for this slot (highest random weight first)."""
    weights = [blake2b(b"%d %b" % (slot, name.encode()), digest_size=8).digest() for name in names]
    return sorted(range(len(names)), key=weights.__getitem__, reverse=True)
