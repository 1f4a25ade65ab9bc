"""What a user's token allows: its experts, and the limits of its requests over all workers. No I/O.

A request is charged before it gets a place: it counts as one request of the present minute, as one in flight, and
reserves the tokens that it may generate. At its end, the reservation is replaced by what was generated. One `Charge`
ends once, however the request ends. The counts of the workers are in shared memory (see `window_count`); they start at
0 with each router.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Final

from hpc_router.errors import ExpertForbiddenError, RateLimitedError, suggest
from hpc_router.relay.in_flight import Cells
from hpc_router.router.access.request_traits import RequestTraits
from hpc_router.router.access.window_count import left_s, settle, try_add, window_at
from hpc_router.router.replicas.admission import DepartureRate
from hpc_router.state.user_tokens import SLOTS, UserToken, find_token

DEFAULT_OUTPUT_TOKENS: Final = 256
"""Tokens that a request without `max_tokens` reserves at an expert whose responses are not measured yet."""
SAMPLES: Final = 256
"""Number of responses per expert of which the median is used."""
_REFRESH: Final = 16
"""Number of responses after which the median is computed again."""
Clock = Callable[[], float]
_REQUESTS: Final = SLOTS
_TOKENS: Final = 2 * SLOTS


class TokenSource(StrEnum):
    """Where the number of generated tokens comes from."""

    USAGE = "usage"  # the response states it
    CHUNKS = "chunks"  # counted events of the stream
    RESERVED = "reserved"  # neither: the reservation stays


@dataclass(slots=True)
class OutputLengths:
    """The median number of generated tokens of each expert's last responses, as this worker saw them."""

    _samples: dict[str, deque[int]] = field(default_factory=dict)
    _medians: dict[str, int] = field(default_factory=dict)
    _fresh: dict[str, int] = field(default_factory=dict)

    def add(self, expert: str, tokens: int) -> None:
        samples = self._samples.setdefault(expert, deque(maxlen=SAMPLES))
        samples.append(tokens)
        count = self._fresh[expert] = self._fresh.get(expert, 0) + 1
        if count >= _REFRESH or len(samples) < _REFRESH:
            self._fresh[expert] = 0
            self._medians[expert] = round(median(samples))

    def expected(self, expert: str) -> int:
        return self._medians.get(expert, DEFAULT_OUTPUT_TOKENS)


@dataclass(slots=True, eq=False)
class Charge:
    """What one request has taken of its token's limits. `reserved`: tokens reserved in `window`, for `choices`
    responses. `counted`: whether the number of generated tokens is needed."""

    access: "UserAccess"
    expert: str
    reserved: int
    window: int
    choices: int
    counted: bool
    _ended: bool = False

    def end(self, generated: int | None) -> None:
        """Gives the place back, and replaces the reservation by `generated` tokens; None: the reservation stays. Later
        calls have no effect."""
        if self._ended:
            return
        self._ended = True
        access = self.access
        access.leave()
        if not self.counted or generated is None:
            return
        settle(
            access.cells, _TOKENS + access.token.slot,
            added_in=self.window, window=window_at(access.clock()), difference=generated - self.reserved,
        )  # fmt: skip
        access.lengths.add(self.expert, generated // self.choices)


class UserAccess:
    """One token in one worker. `expires_at`: Unix seconds; 0 once the token is revoked. The worker writes its counts to
    `cells` and reads those of the others from `peers`."""

    __slots__ = (
        "_departures", "_in_flight", "cells", "clock", "experts", "expires_at", "lengths", "peers", "revoked", "token",
    )  # fmt: skip

    def __init__(
        self, token: UserToken, cells: Cells, peers: Sequence[Cells], lengths: OutputLengths, *, clock: Clock
    ) -> None:
        self.cells, self.peers, self.lengths, self.clock = cells, peers, lengths, clock
        self._in_flight = 0
        self._departures = DepartureRate()
        self.renew(token)

    def renew(self, token: UserToken) -> None:
        """Replaces the entry by a newer one of the same token."""
        self.token = token
        self.revoked = False
        self.expires_at = float("inf") if token.expires_at is None else token.expires_at
        self.experts = None if token.experts is None else frozenset(token.experts)

    def revoke(self) -> None:
        self.revoked, self.expires_at = True, 0.0

    def check_expert(self, expert: str) -> None:
        """Raises ExpertForbiddenError if the token may not use the expert."""
        if self.experts is not None and expert not in self.experts:
            raise ExpertForbiddenError(
                f"this token may not use the expert {expert!r}{suggest('', ('auto', *self.experts))}", param="model"
            )

    def allowed(self, experts: Collection[str]) -> Collection[str]:
        """Returns those of the experts that the token may use."""
        return experts if self.experts is None else self.experts.intersection(experts)

    def charge(self, traits: RequestTraits, expert: str) -> Charge:
        """Counts a request to the expert. Raises RateLimitedError, and counts nothing, if that would exceed a limit."""
        token, cells, now = self.token, self.cells, self.clock()
        limits, slot, window, reserved = token.limits, token.slot, window_at(now), 0
        self._in_flight += 1
        cells[slot] = self._in_flight
        try:
            if limits.concurrency is not None:
                self._check_concurrency(limits.concurrency, now)
            counted = limits.tokens is not None and traits.generates
            if counted:
                assert limits.tokens is not None
                window, reserved = self._reserve(traits, expert, limits.tokens, window, now)
            if limits.requests is not None:
                added = try_add(cells, self.peers, _REQUESTS + slot, window, 1, limits.requests)
                if added is None:
                    if counted:
                        at = _TOKENS + slot
                        settle(cells, at, added_in=window, window=window, difference=-reserved)
                    text = f"limit of {limits.requests} requests per minute"
                    raise self._limited("requests", text, retry_after_s=left_s(now))
        except RateLimitedError:
            self._in_flight -= 1
            cells[slot] = self._in_flight
            raise
        return Charge(self, expert, reserved, window, traits.choices, counted)

    def leave(self) -> None:
        """Counts the end of a request."""
        self._in_flight -= 1
        self.cells[self.token.slot] = self._in_flight
        if self.token.limits.concurrency is not None:
            self._departures.left(self.clock())

    def _check_concurrency(self, limit: int, now: float) -> None:
        total, slot = self._in_flight, self.token.slot
        for peer in self.peers:
            total += peer[slot]
        if total > limit:
            text = f"limit of {limit} requests at the same time"
            raise self._limited("concurrency", text, retry_after_s=self._departures.wait_s(1, now))

    def _reserve(self, traits: RequestTraits, expert: str, limit: int, window: int, now: float) -> tuple[int, int]:
        """Reserves the tokens that a request may generate. Returns the window and the number."""
        each = self.lengths.expected(expert) if traits.max_tokens is None else traits.max_tokens
        amount = each * traits.choices
        added = try_add(self.cells, self.peers, _TOKENS + self.token.slot, window, amount, limit)
        if added is None:
            what = "max_tokens" if traits.max_tokens is not None else f"the usual length of {expert}'s responses"
            text = f"limit of {limit} generated tokens per minute, of which this request reserves {amount} ({what})"
            if amount > limit:
                text += f": set max_tokens so that it reserves at most {limit}"
            raise self._limited("tokens", text, retry_after_s=left_s(now) if amount <= limit else None)
        return added, amount

    def _limited(self, limit: str, text: str, *, retry_after_s: float | None) -> RateLimitedError:
        message = f"user {self.token.user} has reached the {text}"
        return RateLimitedError(message, param=limit, retry_after_s=retry_after_s)


class UserTokens:
    """The tokens of all users in one worker. `cells` and `peers`: this worker's row of the shared counts, and those of
    the other workers."""

    __slots__ = ("_by_id", "_cells", "_clock", "_entries", "_peers", "lengths")

    def __init__(
        self, cells: Cells | None = None, peers: Sequence[Cells] = (), *, clock: Clock = time.monotonic
    ) -> None:
        self._cells = defaultdict[int, int](int) if cells is None else cells
        self._peers, self._clock = peers, clock
        self.lengths = OutputLengths()
        self._entries: dict[str, UserToken] = {}
        self._by_id: dict[str, UserAccess] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[UserToken]:
        return iter(self._entries.values())

    def update(self, tokens: Iterable[UserToken]) -> None:
        """Replaces the tokens. A token that is missing is revoked at once, also where its head is cached."""
        before, self._entries = self._by_id, {token.id: token for token in tokens}
        self._by_id = {}
        for name, token in self._entries.items():
            access = before.get(name)
            if access is None or (access.token.digest, access.token.slot) != (token.digest, token.slot):
                access = UserAccess(token, self._cells, self._peers, self.lengths, clock=self._clock)
            else:
                access.renew(token)
            self._by_id[name] = access
        for access in before.values():
            if self._by_id.get(access.token.id) is not access:
                access.revoke()

    def access_of(self, token_id: str) -> UserAccess | None:
        return self._by_id.get(token_id)

    def find(self, text: str) -> UserAccess | None:
        """Returns the access that the token `text` gives, whether or not it has expired; None for any other text."""
        found = find_token(text, self._entries)
        return None if found is None else self._by_id[found.id]
