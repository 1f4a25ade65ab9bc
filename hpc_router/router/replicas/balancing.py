"""Which replica of an expert a request gets: the lighter of two, or the one its conversation is pinned to. No I/O.

Two replicas drawn at random and the lighter of them taken spread load nearly as well as the lightest of all, and do not
send everybody to the same one when several workers decide on figures that are a moment old. A conversation goes where
rendezvous hashing puts it, so that the engine's prefix cache stays warm and no table of conversations has to be kept:
a replica that comes or goes moves no conversation but its own. A pin gives way where its replica has more than its
share of the load. Nothing here knows requests or experts.
"""

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from random import Random
from typing import Final, Protocol, TypeVar
from zlib import crc32

SLOTS: Final = 4096
"""Conversations are told apart no finer than this, so that the order of replicas is made once per slot."""
KEY_CHARS: Final = 2048
"""What is looked at of a conversation's first words."""


class Loaded(Protocol):
    last_used: int

    @property
    def load(self) -> int: ...


R = TypeVar("R", bound=Loaded)


def power_of_two_choices(replicas: Sequence[R], *, fits: Callable[[R], bool], random: Random) -> R | None:
    """Of two that fit, drawn at random, the one with less load; of equals the one not used for longest."""
    count = len(replicas)
    first = int(random.random() * count)
    second = (first + 1 + int(random.random() * (count - 1))) % count
    a, b = replicas[first], replicas[second]
    if not (fits(a) and fits(b)):  # then it is worth looking at all of them
        fitting = [replica for replica in replicas if fits(replica)]
        if len(fitting) > 2:
            fitting = random.sample(fitting, 2)
        if not fitting:
            return None
        a, b = fitting[0], fitting[-1]
    return a if (a.load, a.last_used) <= (b.load, b.last_used) else b


def pinned(order: Sequence[R], *, fits: Callable[[R], bool], bound: float) -> R | None:
    """The first that fits and whose load is under the bound."""
    return next((replica for replica in order if fits(replica) and replica.load < bound), None)


def load_bound(*, total: int, replicas: int, factor: float) -> int:
    """One more request in all, and none has more than `factor` times the average, rounded up."""
    return math.ceil(factor * (total + 1) / max(1, replicas))


def affinity_slot(key: bytes) -> int:
    """Of a conversation, the same in every process."""
    return crc32(key) % SLOTS


def rendezvous(names: Sequence[str], slot: int) -> list[int]:
    """Indices of the names, the one that this slot belongs to first."""
    weights = [blake2b(b"%d %b" % (slot, name.encode()), digest_size=8).digest() for name in names]
    return sorted(range(len(names)), key=weights.__getitem__, reverse=True)
