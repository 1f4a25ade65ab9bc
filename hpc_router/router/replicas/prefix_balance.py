"""Chooses a replica by the prefill that its prefix cache saves, weighed against the work that waits there. No I/O.

Both are counted in bytes of prompt that an engine has to compute, and `prefill_s_per_byte`, measured per expert, makes
seconds of them. The cost of a replica is

    waiting - SAVED_WEIGHT * cached
    waiting = prefill that it has still to compute, of all workers
            + REQUEST_BYTES for each of its requests in flight, also of other clients where its metrics tell
            + RECENT_WEIGHT * prefill that this worker has sent to it within about the last RECENT_S seconds

and the lowest cost wins. `cached` is the longest beginning of the prompt that this worker has sent to that replica
(`prefixes`). So a hot beginning stays on one replica only until the work that waits there outweighs what it saves; then
another replica computes it too, and both have it. The recent prefill keeps the shares of the work even before queues
form.

What this worker does not know, another worker may: rendezvous hashing on the conversation's key gives its home replica,
in every worker the same. The key is the session that the request names, or the first beginning that is not shared with
other conversations. The home gets a credit as if it had the prompt in its cache, times the probability that another
worker got the earlier requests; the home of a named session gets all of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from hpc_router.router.replicas.balancing import SLOTS, rendezvous
from hpc_router.router.replicas.prefixes import FIRST_BIT, NO_PREFIX, SHARED, PrefixMemory, PromptPrefix
from hpc_router.router.replicas.replica import READY, REQUEST_BYTES, Replica, Reservation

SAVED_WEIGHT: Final = 16
"""How many bytes of waiting one cached byte is worth: a byte that must be computed also delays the requests behind it.
A higher weight finds more in the caches, and requests wait longer; 8 to 24 hardly differ."""
RECENT_WEIGHT: Final = 0.05
"""How many bytes of waiting one byte of recent prefill counts as."""
RECENT_S: Final = 20.0
"""Time constant in seconds with which the recent prefill fades."""
FREE_REQUESTS: Final = 8
"""Number of requests in flight by which a replica may exceed its bound (`pin_bound`)."""
SESSION_BYTES: Final = 192
"""How many cached bytes the home of a session that the client has named is credited with, in addition to its prompt and
whatever is known here."""
RATE_BYTES: Final = 2048
"""Minimum prefill in bytes of a request from which the prefill time per byte is measured."""
RATE_WEIGHT: Final = 1 / 32
"""Weight of a new sample in the mean prefill time per byte."""
DEFAULT_S_PER_BYTE: Final = 5e-6
"""Prefill time per byte of an expert that was not measured yet: about that of Llama 3 8B on one H100."""
_MAX_EXPONENT: Final = 30.0


class ReplicaEstimate(NamedTuple):
    """What the choice of a replica weighs. `cached_bytes`: how much of the prompt is in its cache. `prefill_s`: time to
    compute the rest. `wait_s`: time for the work that waits there. `saved_s`: time that the cache saves. `home`:
    whether the conversation's key leads there."""

    replica: str
    in_flight: int
    cached_bytes: int
    prefill_s: float
    wait_s: float
    saved_s: float
    home: bool
    chosen: bool


@dataclass(slots=True)
class PrefixBalance:
    """The prefix-aware choice of one worker. `replicas`: the table's replicas by name. `other_workers`: number of the
    router's other workers."""

    replicas: Mapping[str, Replica]
    other_workers: int = 0
    prefill_s_per_byte: dict[str, float] = field(default_factory=dict)
    _memories: dict[str, PrefixMemory] = field(default_factory=dict)
    _orders: dict[str, dict[int, list[Replica]]] = field(default_factory=dict)  # rendezvous order by slot
    _last: tuple[PromptPrefix, Sequence[tuple[int, int]]] = (NO_PREFIX, ())  # the last prompt, and who has it
    _epoch: float = 0.0
    _unit: float = 1.0

    def choose(
        self,
        expert: str,
        replicas: Sequence[Replica],
        prefix: PromptPrefix,
        *,
        fits: Callable[[Replica], bool] | None,
        pin_bound: float,
        now: float,
    ) -> Replica | None:
        """Returns the replica of the lowest cost that has room and that `fits`, if given. Returns None if there is
        none, or if it has more than `pin_bound` times the average number of requests in flight, plus `FREE_REQUESTS`.
        `now`: monotonic time."""
        cached, key, credit = self._look_up(expert, prefix)
        home = None if key is None else self._home(expert, replicas, key)
        self._unit = self._growth(now)
        fading = RECENT_WEIGHT / self._unit
        best, lowest = None, math.inf
        for one in replicas:
            in_flight = len(one.reservations) + one.peer_in_flight
            if one.state is not READY or in_flight >= one.capacity or not (fits is None or fits(one)):
                continue
            cost = one.prefill_bytes + one.peer_prefill_bytes + REQUEST_BYTES * in_flight + fading * one.recent_bytes
            if cached:
                for bits, length in cached:
                    if bits & one.prefix_bit:
                        cost -= SAVED_WEIGHT * length
                        break
            if one is home:
                cost -= credit
            if cost < lowest or (cost == lowest and best is not None and one.last_used < best.last_used):
                best, lowest = one, cost
        if best is not None and best.load > FREE_REQUESTS:
            average = (sum([one.load for one in replicas]) + 1) / len(replicas)
            if best.load >= pin_bound * average + FREE_REQUESTS:
                return None
        return best

    def _look_up(self, expert: str, prefix: PromptPrefix) -> tuple[Sequence[tuple[int, int]], int | None, float]:
        """Returns three values. First, pairs of replicas' bits and the length in bytes of the beginning that they have
        in their caches, the longest first. Second, the key that leads to the conversation's home, and third the home's
        credit in bytes. The key is None if the client named no session, and the conversation is known here or no other
        worker can know it."""
        hashes, ends, total, key = prefix
        memory = self._memories.get(expert)
        found = memory.find(hashes) if memory is not None else []
        cached: list[tuple[int, int]] = []
        shared, seen = 0, FIRST_BIT - 1
        for at in range(len(found) - 1, -1, -1):
            entry = found[at]
            if entry & SHARED and not shared:
                shared = at + 1
            bits = entry & ~seen
            if bits:
                seen |= bits
                cached.append((bits, ends[at]))
        self._last = prefix, cached
        if len(found) > shared:
            return cached, key, SAVED_WEIGHT * SESSION_BYTES
        others = self.other_workers
        unknown = SAVED_WEIGHT * (total - (ends[len(found) - 1] if found else 0))
        if key is None and hashes and others:
            return cached, hashes[min(shared, len(hashes) - 1)], unknown * others / (others + 1)
        return cached, key, unknown + SAVED_WEIGHT * SESSION_BYTES

    def _home(self, expert: str, replicas: Sequence[Replica], key: int) -> Replica | None:
        """Returns the first replica with room in the rendezvous order of this key."""
        orders, slot = self._orders.setdefault(expert, {}), key % SLOTS
        order = orders.get(slot)
        if order is None:
            order = orders[slot] = [replicas[at] for at in rendezvous([r.slot_name for r in replicas], slot)]
        for one in order:
            if one.has_room:
                return one
        return None

    def place(self, reservation: Reservation, prefix: PromptPrefix, *, now: float) -> None:
        """Records that the reserved replica gets the prompt."""
        replica = reservation.replica
        memory = self._memories.get(reservation.expert)
        if memory is None:
            memory = self._memories[reservation.expert] = PrefixMemory()
        if self._last[0] is not prefix:  # the request has waited for its place
            self._look_up(reservation.expert, prefix)
            self._unit = self._growth(now)
        bit = replica.prefix_bit
        cached = _length(self._last[1], bit)
        memory.add(prefix.hashes, bit, now)
        new = max(1, prefix.total - cached)
        replica.recent_bytes += new * self._unit
        replica.prefill_bytes += new
        reservation.prefill_bytes, reservation.placed_at = new, now
        reservation.queued_bytes = replica.prefill_bytes + replica.peer_prefill_bytes

    def measure(self, reservation: Reservation, *, now: float) -> None:
        """Measures the prefill time per byte by a request whose response has begun."""
        if reservation.prefill_bytes >= RATE_BYTES:
            sample = (now - reservation.placed_at) / reservation.queued_bytes
            rates, expert = self.prefill_s_per_byte, reservation.expert
            rates[expert] = rates[expert] + RATE_WEIGHT * (sample - rates[expert]) if expert in rates else sample

    def indexed(self) -> None:
        """Has to be called when the replicas of an expert have changed."""
        self._orders.clear()

    def added(self, replica: Replica) -> None:
        """Gives the replica the lowest bit that no other replica has."""
        taken = {one.prefix_bit for one in self.replicas.values() if one is not replica}
        bit = FIRST_BIT
        while bit in taken:
            bit <<= 1
        replica.prefix_bit = bit

    def removed(self, replica: Replica) -> None:
        """Forgets what the replica has in its cache."""
        self._last = NO_PREFIX, ()
        for memory in self._memories.values():
            memory.forget(replica.prefix_bit)

    def explain(
        self,
        expert: str,
        replicas: Sequence[Replica],
        prefix: PromptPrefix,
        *,
        pin_bound: float,
        now: float,
    ) -> list[ReplicaEstimate]:
        """Returns what `choose` weighs for each replica that has room, in seconds."""
        chosen = self.choose(expert, replicas, prefix, fits=None, pin_bound=pin_bound, now=now)
        cached, key, _ = self._look_up(expert, prefix)
        home = None if key is None else self._home(expert, replicas, key)
        fading = RECENT_WEIGHT / self._growth(now)
        per_byte_s = self.prefill_s_per_byte.get(expert, DEFAULT_S_PER_BYTE)
        estimates = []
        for one in (one for one in replicas if one.has_room):
            length = _length(cached, one.prefix_bit)
            waiting = one.prefill_bytes + one.peer_prefill_bytes + REQUEST_BYTES * one.load + fading * one.recent_bytes
            estimates.append(
                ReplicaEstimate(
                    one.name,
                    one.load,
                    length,
                    prefill_s=(prefix.total - length) * per_byte_s,
                    wait_s=waiting * per_byte_s,
                    saved_s=length * per_byte_s,
                    home=one is home,
                    chosen=one is chosen,
                )
            )
        return estimates

    def _growth(self, now: float) -> float:
        """Returns the unit of `recent_bytes` at this time. It grows, so that what was added earlier fades without a
        change."""
        exponent = (now - self._epoch) / RECENT_S
        if exponent > _MAX_EXPONENT:
            unit = math.exp(min(exponent, 700.0))
            for one in self.replicas.values():
                one.recent_bytes /= unit
            self._epoch, exponent = now, 0.0
        return math.exp(exponent)


def _length(cached: Sequence[tuple[int, int]], bit: int) -> int:
    """Returns how many bytes of the prompt's beginning a replica has in its cache. `cached`: pairs of the replicas,
    as bits, that have a beginning, and the length of that beginning, longest first. `bit`: the replica's bit."""
    for bits, length in cached:
        if bits & bit:
            return length
    return 0
