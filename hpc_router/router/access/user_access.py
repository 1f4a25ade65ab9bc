"""What a user's token allows: its experts, and the limits of its requests over all workers. No I/O.

A request is charged before it gets a place on a replica: it counts as one request of the present minute, as one in
flight, and reserves the number of tokens that it may generate. At its end, the number that it has generated replaces
the reserved one. A `Charge` ends exactly once, however the request ends. The counts of the workers are in shared memory
(see `window_count`); they start at 0 when a router starts.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from hpc_router.errors import ExpertForbiddenError, RateLimitedError, suggest
from hpc_router.relay.in_flight import Cells
from hpc_router.router.access.request_traits import traits_of
from hpc_router.router.access.window_count import TOKEN_CELLS, Limit, LimitCounts, left_s
from hpc_router.router.replicas.admission import DEFAULT_WAIT_S, MAX_WAIT_S, MIN_WAIT_S, RATE_WINDOW_S
from hpc_router.router.replicas.lifetime import max_tokens_of
from hpc_router.state.user_tokens import TokenLimits, UserToken, find_token

DEFAULT_OUTPUT_TOKENS: Final = 256
"""Tokens that a request without `max_tokens` reserves at an expert whose responses are not measured yet."""
SAMPLES: Final = 256
"""Number of responses per expert of which the median is used; up to `_REFRESH` more."""
_REFRESH: Final = 64
"""Number of responses after which the median is computed again."""
Clock = Callable[[], float]


class TokenSource(StrEnum):
    """How the number of a response's generated tokens is known."""

    __hash__ = str.__hash__  # written in C, while the hash of an enum is Python code

    USAGE = "usage"  # the response states it
    CHUNKS = "chunks"  # counted events of the stream
    RESERVED = "reserved"  # neither: the reservation stays


class OutputLengths:
    """The numbers of generated tokens of the last responses of one expert that this worker relayed. Their `median` is
    reserved for a request without `max_tokens`."""

    __slots__ = ("_refresh_at", "_samples", "median")

    def __init__(self) -> None:
        self.median = DEFAULT_OUTPUT_TOKENS
        self._samples: list[int] = []
        self._refresh_at = 1

    def add(self, tokens: int) -> None:
        samples = self._samples
        samples.append(tokens)
        if len(samples) >= self._refresh_at:
            self._refresh()

    def _refresh(self) -> None:
        samples = self._samples
        self.median = sorted(samples)[len(samples) // 2]
        if len(samples) > SAMPLES:
            del samples[:_REFRESH]
        self._refresh_at = len(samples) + (1 if len(samples) < _REFRESH else _REFRESH)


class Charge:
    """What one request has taken of its token's limits. `reserved`: number of tokens reserved in the minute `window`,
    for `choices` responses. `lengths`: those of the responses of the request's expert, if generated tokens are counted;
    else None."""

    __slots__ = ("_access", "_choices", "_lengths", "_window", "reserved")

    def __init__(
        self, access: "UserAccess", reserved: int, window: int, choices: int, lengths: OutputLengths | None
    ) -> None:
        self._access: UserAccess | None = access
        self.reserved = reserved
        self._window = window
        self._choices = choices
        self._lengths = lengths

    @property
    def counted(self) -> bool:
        """Whether the token has a limit for generated tokens, so that those of the response are counted."""
        return self._lengths is not None

    def end(self, generated: int | None) -> None:
        """Counts the request as no longer in flight, and replaces the reserved number of tokens by `generated`; with
        None, the reserved number stays charged. Later calls have no effect."""
        access, lengths = self._access, self._lengths
        if access is None:
            return
        self._access = None
        if lengths is None or generated is None:
            access.counts.end(self._window, 0, 0.0)
            return
        access.counts.end(self._window, generated - self.reserved, access.clock())
        lengths.add(generated if self._choices == 1 else generated // self._choices)


class UserAccess:
    """What one user's token allows, and its `counts` in one worker. `expires_at`: Unix seconds; 0 once the token is
    revoked. `lengths`: lengths of responses by expert, from which the tokens to reserve are estimated."""

    __slots__ = (
        "_counts_tokens", "_mean_s", "_since", "clock", "counts", "experts", "expires_at", "lengths", "revoked",
        "token", "unlimited",
    )  # fmt: skip

    def __init__(
        self, token: UserToken, counts: LimitCounts, lengths: Mapping[str, OutputLengths], *, clock: Clock
    ) -> None:
        self.counts, self.lengths, self.clock = counts, lengths, clock
        self._since, self._mean_s = clock(), DEFAULT_WAIT_S
        self.renew(token)

    def renew(self, token: UserToken) -> None:
        """Takes experts, limits and expiry from `token`, a newer entry of the same token. The counts stay."""
        self.token = token
        self.revoked = False
        self.expires_at = float("inf") if token.expires_at is None else token.expires_at
        self.experts = None if token.experts is None else frozenset(token.experts)
        self.unlimited = token.limits == TokenLimits()
        self._counts_tokens = token.limits.tokens is not None
        self.counts.limit(token.limits)

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
        now, choices, lengths = self.clock(), 1, None
        reserved: int | None = None
        if self._counts_tokens and (traits := traits_of(path, fields)) is not None:
            choices, length = traits
            lengths = self.lengths[expert]
            reserved = choices * (lengths.median if length is None else length)
        reached = self.counts.begin(now, reserved)
        if reached is not None:
            raise self._limited(reached, now, reserved, fields, expert)
        return Charge(self, reserved or 0, self.counts.window, choices, lengths)

    def _wait_s(self, now: float) -> float:
        """Returns the expected time in seconds until one of the token's requests in flight ends: the mean time between
        two ends in the present interval of `RATE_WINDOW_S` or, if none has ended in it, in an earlier interval."""
        elapsed_s = now - self._since
        if self.counts.ended:
            self._mean_s = elapsed_s / self.counts.ended
        if elapsed_s > RATE_WINDOW_S:
            self._since, self.counts.ended = now, 0
        return min(max(self._mean_s, MIN_WAIT_S), MAX_WAIT_S)

    def _limited(
        self, limit: Limit, now: float, reserved: int | None, fields: Mapping[str, Any], expert: str
    ) -> RateLimitedError:
        limits, wait_s = self.token.limits, None
        match limit:
            case Limit.CONCURRENCY:
                text, wait_s = f"{limits.concurrency} requests at the same time", self._wait_s(now)
            case Limit.REQUESTS:
                text, wait_s = f"{limits.requests} requests per minute", left_s(now)
            case Limit.TOKENS:
                what = f"the usual length of {expert}'s responses" if max_tokens_of(fields) is None else "max_tokens"
                text = (
                    f"{limits.tokens} generated tokens per minute, of which this request reserves {reserved} ({what})"
                )
                if limits.tokens is not None and reserved is not None and reserved > limits.tokens:
                    text += f": set max_tokens so that it reserves at most {limits.tokens}"
                else:
                    wait_s = left_s(now)
        message = f"user {self.token.user} has reached the limit of {text}"
        return RateLimitedError(message, param=limit, retry_after_s=wait_s)


class UserTokens:
    """The tokens of all users in one worker. `cells` and `peers`: this worker's row of the shared counts, and those of
    the other workers."""

    __slots__ = ("_by_id", "_cells", "_clock", "_counts", "_entries", "_peers", "lengths")

    def __init__(
        self, cells: Cells | None = None, peers: Sequence[Cells] = (), *, clock: Clock = time.monotonic
    ) -> None:
        self._cells = defaultdict[int, int](int) if cells is None else cells
        self._peers, self._clock = peers, clock
        self.lengths = defaultdict[str, OutputLengths](OutputLengths)
        self._counts: dict[int, LimitCounts] = {}
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
                access = UserAccess(token, self._counts_of(token.slot), self.lengths, clock=self._clock)
            else:
                access.renew(token)
            self._by_id[name] = access
        for access in before.values():
            if self._by_id.get(access.token.id) is not access:
                access.revoke()

    def _counts_of(self, slot: int) -> LimitCounts:
        """Returns the counts of the slot. There is one object for each, because requests of a token that was revoked
        and has come back, or whose slot another token has now, may still be in flight."""
        counts = self._counts.get(slot)
        if counts is None:
            counts = self._counts[slot] = LimitCounts(self._cells, self._peers, TOKEN_CELLS * slot)
        return counts

    def access_of(self, token_id: str) -> UserAccess | None:
        return self._by_id.get(token_id)

    def find(self, text: str) -> UserAccess | None:
        """Returns what the token with the text `text` allows, even if it has expired; None if there is no such
        token."""
        found = find_token(text, self._entries)
        return None if found is None else self._by_id[found.id]
