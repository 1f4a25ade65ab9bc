"""Which replica of an expert a request gets: by power of two choices, or by the affinity of its conversation. No I/O.

The less loaded of two random replicas spreads load nearly as well as the least loaded of all, and workers that decide
on slightly old counts do not all pick the same one. A conversation goes where rendezvous hashing puts it, so that the
engine's prefix cache stays warm without a table of conversations; a replica that comes or goes moves only its own.
Affinity yields where a replica has more than its share of the load. Nothing here knows requests or experts.
"""

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from random import Random
from typing import Final, Protocol, TypeVar
from zlib import crc32

SLOTS: Final = 4096
"""Number of affinity slots that conversations are hashed to; the order of replicas is computed once per slot."""
KEY_CHARS: Final = 2048
"""Length of the prefix of a conversation's first message that is hashed."""


class Loaded(Protocol):
    last_used: int

    @property
    def load(self) -> int: ...


R = TypeVar("R", bound=Loaded)


def power_of_two_choices(replicas: Sequence[R], *, fits: Callable[[R], bool], random: Random) -> R | None:
    """The less loaded of two random replicas that fit; at equal load the least recently used one."""
    count = len(replicas)
    first = int(random.random() * count)
    second = (first + 1 + int(random.random() * (count - 1))) % count
    a, b = replicas[first], replicas[second]
    if not (fits(a) and fits(b)):  # draw again, from those that fit
        fitting = [replica for replica in replicas if fits(replica)]
        if len(fitting) > 2:
            fitting = random.sample(fitting, 2)
        if not fitting:
            return None
        a, b = fitting[0], fitting[-1]
    return a if (a.load, a.last_used) <= (b.load, b.last_used) else b


def affinity(order: Sequence[R], *, fits: Callable[[R], bool], bound: float) -> R | None:
    """The first replica in rendezvous order that fits and whose load is below the bound."""
    return next((replica for replica in order if fits(replica) and replica.load < bound), None)


def load_bound(*, total: int, replicas: int, factor: float) -> int:
    """`factor` times the average load after one more request, rounded up."""
    return math.ceil(factor * (total + 1) / max(1, replicas))


def affinity_slot(key: bytes) -> int:
    """The slot of a conversation's key, the same in every process."""
    return crc32(key) % SLOTS


def rendezvous(names: Sequence[str], slot: int) -> list[int]:
    """Indices of the names in order of preference for this slot (highest random weight first)."""
    weights = [blake2b(b"%d %b" % (slot, name.encode()), digest_size=8).digest() for name in names]
    return sorted(range(len(names)), key=weights.__getitem__, reverse=True)
