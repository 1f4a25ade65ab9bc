"""The limits of a user's token, over several workers."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.errors import ExpertForbiddenError, RateLimitedError
from hpc_router.router.access.request_traits import RequestTraits, traits_of
from hpc_router.router.access.user_access import DEFAULT_OUTPUT_TOKENS, Charge, UserTokens
from hpc_router.router.access.window_count import TOKEN_CELLS
from hpc_router.router.ipc.shared_counters import Counters
from hpc_router.state.user_tokens import TokenLimits, UserToken

TOKEN = UserToken("0a1b2c3d", "alice", "0" * 64, 5, 0.0)
CHAT = "/v1/chat/completions"


class Clock:
    now = 600.0

    def __call__(self) -> float:
        return self.now


class Router:
    """The workers of a router in one process, over the real shared memory."""

    def __init__(self, limits: TokenLimits, *, workers: int = 2, **fields: Any) -> None:
        self.clock, self.counters = Clock(), Counters(workers=workers)
        self.token = replace(TOKEN, limits=limits, **fields)
        self.workers = [
            UserTokens(self.counters.token_row(w), self.counters.token_others(w), clock=self.clock)
            for w in range(workers)
        ]
        for users in self.workers:
            users.update([self.token])

    def charge(self, worker: int = 0, *, expert: str = "math", **fields: Any) -> Charge:
        access = self.workers[worker].access_of(TOKEN.id)
        assert access is not None
        return access.charge(CHAT, fields, expert)


def refusal(router: Router, worker: int = 0, **fields: Any) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as caught:
        router.charge(worker, **fields)
    return caught.value


def test_requests_per_minute_over_all_workers() -> None:
    router = Router(TokenLimits(requests=3))
    for worker in (0, 1, 0):
        router.charge(worker).end(None)
    router.clock.now += 18.5
    error = refusal(router, 1)
    assert (error.param, error.retry_after_s) == ("requests", 41.5)
    assert "limit of 3 requests per minute" in str(error)
    router.clock.now += 41.5
    router.charge(1)


def test_requests_at_the_same_time_over_all_workers() -> None:
    router = Router(TokenLimits(concurrency=2))
    first, _ = router.charge(0), router.charge(1)
    error = refusal(router, 1)
    assert error.param == "concurrency"
    assert error.retry_after_s == 2.0, "before any request has ended"
    first.end(None)
    first.end(None)
    router.charge(1)
    refusal(router, 0)


def test_the_wait_for_a_place_follows_from_the_requests_that_ended() -> None:
    router = Router(TokenLimits(concurrency=1), workers=1)
    for _ in range(4):
        charge = router.charge()
        router.clock.now += 5.0
        charge.end(None)
    router.charge()
    assert refusal(router).retry_after_s == 5.0
    router.clock.now += 20.0
    assert refusal(router).retry_after_s == 10.0, "40 seconds for four"
    assert refusal(router).retry_after_s == 10.0, "the last interval counts until another request has ended"


def test_tokens_are_reserved_from_max_tokens_and_settled() -> None:
    router = Router(TokenLimits(tokens=100))
    charge = router.charge(0, max_tokens=80)
    error = refusal(router, 1, max_tokens=30)
    assert (error.param, error.retry_after_s) == ("tokens", 60.0)
    assert "reserves 30 (max_tokens)" in str(error)
    charge.end(10)
    router.charge(1, max_tokens=90)
    refusal(router, 0, max_tokens=1)


def test_a_reservation_stays_if_nothing_is_known_of_the_response() -> None:
    router = Router(TokenLimits(tokens=100))
    router.charge(max_tokens=80).end(None)
    refusal(router, 1, max_tokens=21)
    router.charge(1, max_tokens=20)


@pytest.mark.parametrize("worker", [0, 1])
def test_a_request_without_generated_tokens_is_not_refused_for_them(worker: int) -> None:
    """Not even after a response that was longer than the rest of the limit."""
    router = Router(TokenLimits(tokens=300, requests=9))
    router.charge(0).end(1000)
    access = router.workers[worker].access_of(TOKEN.id)
    assert access is not None
    access.charge("/v1/embeddings", {"input": "x"}, "math").end(None)
    assert refusal(router, worker, max_tokens=1).param == "tokens"


def test_a_token_that_was_away_for_a_moment_keeps_its_counts() -> None:
    """Its requests in flight began with the entry of before."""
    router = Router(TokenLimits(tokens=100, concurrency=2), workers=2)
    users = router.workers[0]
    before = router.charge(0, max_tokens=60)
    users.update([])
    users.update([router.token])
    router.charge(0, max_tokens=40)
    assert refusal(router, 1, max_tokens=1).param == "concurrency"
    before.end(50)
    assert "reserves 11" in str(refusal(router, 1, max_tokens=11))
    router.charge(1, max_tokens=10)


def test_a_request_that_can_never_fit_is_not_told_to_come_again() -> None:
    error = refusal(Router(TokenLimits(tokens=100)), max_tokens=101)
    assert error.retry_after_s is None
    assert "set max_tokens so that it reserves at most 100" in str(error)


def test_without_max_tokens_the_median_of_the_experts_responses_is_reserved() -> None:
    router = Router(TokenLimits(tokens=10_000), workers=1)
    assert router.charge().reserved == DEFAULT_OUTPUT_TOKENS
    for tokens in (10, 500, 30):
        router.charge(max_tokens=1000).end(tokens)
    assert router.charge().reserved == 30
    for _ in range(1000):
        router.charge(max_tokens=1).end(1)
    assert router.charge().reserved == 1, "the last responses count"
    assert router.charge(expert="law").reserved == DEFAULT_OUTPUT_TOKENS


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (CHAT, {"max_completion_tokens": 7, "n": 3}, RequestTraits(3, 7)),
        ("/v1/responses", {"max_output_tokens": 7}, RequestTraits(1, 7)),
        ("/v1/completions", {"prompt": ["a", "b"], "best_of": 2}, RequestTraits(4)),
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 0}, RequestTraits(1)),
        ("/v1/completions", {"prompt": [[1], [2]], "n": "x"}, RequestTraits(2)),
        ("/v1/embeddings", {"max_tokens": 5}, None),
        ("/tokenize", {}, None),
    ],
)
def test_the_traits_of_a_request(path: str, fields: dict[str, Any], expected: RequestTraits | None) -> None:
    assert traits_of(path, fields) == expected


def test_a_refused_request_takes_nothing() -> None:
    """Whichever limit refuses it, the others get back what it had taken of them."""
    router = Router(TokenLimits(requests=1, tokens=100, concurrency=2), workers=1)
    charge = router.charge(max_tokens=10)
    assert refusal(router, max_tokens=90).param == "requests"
    assert refusal(router, max_tokens=91).param == "tokens"
    charge.end(10)
    router.clock.now += 60
    router.charge(max_tokens=100)


def test_a_dead_worker_frees_its_places_and_keeps_the_minutes_counts() -> None:
    router = Router(TokenLimits(requests=2, concurrency=1))
    router.charge(0)
    assert refusal(router, 1).param == "concurrency"
    router.counters.clear(0)
    router.charge(1).end(None)
    assert refusal(router, 1).param == "requests"


def test_experts() -> None:
    access = Router(TokenLimits(), experts=("math", "law")).workers[0].access_of(TOKEN.id)
    assert access is not None
    access.check_expert("law")
    with pytest.raises(ExpertForbiddenError, match=r"may not use the expert 'code' \(valid: auto, law, math\)"):
        access.check_expert("code")
    assert set(access.allowed(["code", "law"])) == {"law"}


def test_a_revoked_token_is_invalid_where_it_is_cached() -> None:
    router = Router(TokenLimits())
    users = router.workers[0]
    access = users.access_of(TOKEN.id)
    assert access is not None
    users.update([replace(router.token, limits=TokenLimits(requests=9))])
    assert users.access_of(TOKEN.id) is access
    assert access.token.limits.requests == 9
    users.update([])
    assert (access.revoked, access.expires_at, users.access_of(TOKEN.id)) == (True, 0.0, None)


@given(st.data())
def test_every_count_is_zero_after_any_sequence_of_requests(data: st.DataObject) -> None:
    """Places are given back, and no window exceeds what was reserved at most and settled."""
    router, open_charges = Router(TokenLimits(requests=6, tokens=60, concurrency=3)), list[Charge]()
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["begin", "begin", "end", "wait"])):
            case "begin":
                try:
                    worker, tokens = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 40))
                    open_charges.append(router.charge(worker, max_tokens=tokens))
                except RateLimitedError:
                    pass
            case "end" if open_charges:
                charge = open_charges.pop(data.draw(st.integers(0, len(open_charges) - 1)))
                charge.end(data.draw(st.one_of(st.none(), st.integers(0, charge.reserved))))
            case _:
                router.clock.now += data.draw(st.integers(0, 45))
        assert len(open_charges) <= 3
    for charge in open_charges:
        charge.end(None)
    assert [router.counters.token_row(w)[TOKEN_CELLS * TOKEN.slot] for w in range(2)] == [0, 0]
    router.clock.now += 60
    for _ in range(6):
        router.charge(0, max_tokens=10).end(10)
    refusal(router, 1, max_tokens=10)
