"""What a user's token allows: its experts, and the limits of its requests over all workers. No I/O.

A request is charged before it gets a place on a replica: it counts as one request of the present minute, as one in
flight, and reserves the number of tokens that it may generate. At its end, the number that it has generated replaces
the reserved one. A `Charge` ends exactly once, however the request ends. The counts of the workers are in shared memory
(see `window_count`); they start at 0 when a router starts.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from hpc_router.errors import ExpertForbiddenError, RateLimitedError, suggest
from hpc_router.relay.in_flight import Cells
from hpc_router.router.access.request_traits import RequestTraits, traits_of
from hpc_router.router.access.window_count import WINDOW_S, left_s, settle, try_add
from hpc_router.router.replicas.admission import DEFAULT_WAIT_S, MAX_WAIT_S, MIN_WAIT_S, RATE_WINDOW_S
from hpc_router.state.user_tokens import TokenLimits, UserToken, find_token

DEFAULT_OUTPUT_TOKENS: Final = 256
"""Tokens that a request without `max_tokens` reserves at an expert whose responses are not measured yet."""
SAMPLES: Final = 256
"""Number of responses per expert of which the median is used; up to `_REFRESH` more."""
_REFRESH: Final = 64
"""Number of responses after which the median is computed again."""
TOKEN_COUNTS: Final = 3
"""Number of cells of a token, from `TOKEN_COUNTS * slot` on: requests in flight, requests and generated tokens of the
present minute. They are side by side, so that a request needs one line of the CPU's cache for them."""
_REQUESTS: Final = 1
_TOKENS: Final = 2
Clock = Callable[[], float]


class TokenSource(StrEnum):
    """How the number of a response's generated tokens is known."""

    __hash__ = str.__hash__  # written in C, while the hash of an enum is Python code

    USAGE = "usage"  # the response states it
    CHUNKS = "chunks"  # counted events of the stream
    RESERVED = "reserved"  # neither: the reservation stays


class OutputLengths:
    """By expert, the median number of generated tokens of the last responses that this worker relayed. It is reserved
    for a request without `max_tokens`."""

    __slots__ = ("_medians", "_samples")

    def __init__(self) -> None:
        self._samples: dict[str, deque[int]] = {}
        self._medians: dict[str, int] = {}

    def add(self, expert: str, tokens: int) -> None:
        samples = self._samples.get(expert)
        if samples is None:
            samples = self._samples[expert] = deque()
        samples.append(tokens)
        count = len(samples)
        if count < _REFRESH or not count % _REFRESH:
            self._medians[expert] = sorted(samples)[count // 2]
            if count > SAMPLES:
                for _ in range(_REFRESH):
                    samples.popleft()

    def expected(self, expert: str) -> int:
        return self._medians.get(expert, DEFAULT_OUTPUT_TOKENS)


class Charge:
    """What one request has taken of its token's limits. `reserved`: number of tokens reserved in the minute `window`,
    for `choices` responses. `counted`: whether the token has a limit for generated tokens, so that they are counted."""

    __slots__ = ("_access", "_choices", "_window", "counted", "expert", "reserved")

    def __init__(
        self, access: "UserAccess", expert: str, reserved: int, window: int, choices: int, counted: bool
    ) -> None:
        self._access: UserAccess | None = access
        self.expert = expert
        self.reserved = reserved
        self._window = window
        self._choices = choices
        self.counted = counted

    def end(self, generated: int | None) -> None:
        """Counts the request as no longer in flight, and replaces the reserved number of tokens by `generated`; with
        None, the reserved number stays charged. Later calls have no effect."""
        access = self._access
        if access is None:
            return
        self._access = None
        access.leave()
        if self.counted and generated is not None:
            window = int(access.clock() // WINDOW_S)
            settle(access.cells, _TOKENS + access.at, self._window, window, generated - self.reserved)
            access.lengths.add(self.expert, generated if self._choices == 1 else generated // self._choices)


class UserAccess:
    """What one user's token allows, and its counts in one worker. `expires_at`: Unix seconds; 0 once the token is
    revoked. The worker writes its counts to `cells`, from index `at` on, and reads those of the other workers from
    `peers`. `lengths`: lengths of responses, from which the tokens to reserve are estimated."""

    __slots__ = (
        "_in_flight", "_left", "_limits", "_mean_s", "_since", "at", "cells", "clock", "experts", "expires_at",
        "lengths", "peers", "revoked", "token", "unlimited",
    )  # fmt: skip

    def __init__(
        self, token: UserToken, cells: Cells, peers: Sequence[Cells], lengths: OutputLengths, *, clock: Clock
    ) -> None:
        self.cells, self.peers, self.lengths, self.clock = cells, peers, lengths, clock
        self._in_flight = 0
        self._since, self._left, self._mean_s = clock(), 0, DEFAULT_WAIT_S
        self.renew(token)

    def renew(self, token: UserToken) -> None:
        """Takes experts, limits and expiry from `token`, a newer entry of the same token. The counts stay."""
        self.token = token
        self.revoked = False
        self.expires_at = float("inf") if token.expires_at is None else token.expires_at
        self.experts = None if token.experts is None else frozenset(token.experts)
        self.unlimited = token.limits == TokenLimits()
        self._limits = token.limits.requests, token.limits.tokens, token.limits.concurrency
        self.at = TOKEN_COUNTS * token.slot

    def revoke(self) -> None:
        self.revoked, self.expires_at = True, 0.0

    def check_expert(self, expert: str) -> None:
        """Raises ExpertForbiddenError if the token may not use the expert."""
        if self.experts is not None and expert not in self.experts:
            raise ExpertForbiddenError(
                f"this token may not use the expert {expert!r}{suggest('', ('auto', *self.experts))}", param="model"
            )

    def allowed(self, experts: Collection[str]) -> Collection[str]:
        """Returns those of `experts` that the token may use."""
        return experts if self.experts is None else self.experts.intersection(experts)

    def charge(self, path: str, fields: Mapping[str, Any], expert: str) -> Charge:
        """Counts a request to the expert, and returns its charge. `fields`: the request's body. Raises
        RateLimitedError, and counts nothing, if a limit would be exceeded."""
        cells, peers, now = self.cells, self.peers, self.clock()
        max_requests, max_tokens, max_in_flight = self._limits
        self._in_flight = in_flight = self._in_flight + 1
        at = self.at
        cells[at] = in_flight
        if max_in_flight is not None:
            for peer in peers:
                in_flight += peer[at]
            if in_flight > max_in_flight:
                self._forget()
                text = f"limit of {max_in_flight} requests at the same time"
                raise self._limited("concurrency", text, retry_after_s=self._wait_s(now))
        window, reserved, choices, counted = int(now // WINDOW_S), 0, 1, False
        if max_tokens is not None and (traits := traits_of(path, fields)) is not None:
            counted = True
            choices, length = traits
            reserved = choices * (self.lengths.expected(expert) if length is None else length)
            added = try_add(cells, peers, _TOKENS + at, window, reserved, max_tokens)
            if added is None:
                self._forget()
                raise self._too_many_tokens(traits, expert, reserved, max_tokens, now)
            window = added
        if max_requests is not None and try_add(cells, peers, _REQUESTS + at, window, 1, max_requests) is None:
            self._forget()
            if counted:
                settle(cells, _TOKENS + at, window, window, -reserved)
            text = f"limit of {max_requests} requests per minute"
            raise self._limited("requests", text, retry_after_s=left_s(now))
        return Charge(self, expert, reserved, window, choices, counted)

    def leave(self) -> None:
        """Counts the end of a request: one fewer is in flight."""
        self._in_flight = in_flight = self._in_flight - 1
        self.cells[self.at] = in_flight
        self._left += 1

    def _wait_s(self, now: float) -> float:
        """Returns the expected time in seconds until one of the token's requests in flight ends: the mean time between
        two ends in the present interval of `RATE_WINDOW_S` or, if none has ended in it, in an earlier interval."""
        elapsed_s = now - self._since
        if self._left:
            self._mean_s = elapsed_s / self._left
        if elapsed_s > RATE_WINDOW_S:
            self._since, self._left = now, 0
        return min(max(self._mean_s, MIN_WAIT_S), MAX_WAIT_S)

    def _forget(self) -> None:
        self._in_flight = in_flight = self._in_flight - 1
        self.cells[self.at] = in_flight

    def _too_many_tokens(
        self, traits: RequestTraits, expert: str, reserved: int, limit: int, now: float
    ) -> RateLimitedError:
        what = "max_tokens" if traits.max_tokens is not None else f"the usual length of {expert}'s responses"
        text = f"limit of {limit} generated tokens per minute, of which this request reserves {reserved} ({what})"
        if reserved > limit:
            text += f": set max_tokens so that it reserves at most {limit}"
        return self._limited("tokens", text, retry_after_s=left_s(now) if reserved <= limit else None)

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
        """Replaces all tokens by `tokens`. A known token that is not among them is revoked at once, even for requests
        whose head is cached."""
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
        """Returns what the token with the text `text` allows, even if it has expired; None if there is no such
        token."""
        found = find_token(text, self._entries)
        return None if found is None else self._by_id[found.id]
