"""The budget of retries: a share of what there is, and a minimum."""

from hpc_router.router.worker.retry_budget import WINDOW_S, RetryBudget


def taken(budget: RetryBudget, now: float, *, requests: int, tries: int = 1000) -> int:
    return sum(budget.try_retry(now, requests=requests) for _ in range(tries))


def test_the_minimum_is_had_without_requests() -> None:
    budget = RetryBudget(share=0.2, least_per_s=1.0)
    assert taken(budget, 100.0, requests=0) == WINDOW_S
    assert taken(budget, 100.0 + WINDOW_S, requests=0) == 0, "what was taken a window ago still counts"
    assert taken(budget, 100.0 + 2 * WINDOW_S, requests=0) == WINDOW_S


def test_the_share_is_of_the_requests_of_two_windows() -> None:
    budget = RetryBudget(share=0.2, least_per_s=1.0)
    assert taken(budget, 100.0, requests=1000) == WINDOW_S, "how many were of late is not known yet"
    assert taken(budget, 105.0, requests=1500) == 100
    assert taken(budget, 111.0, requests=2000) == 100
    assert taken(budget, 121.0, requests=2500) == 10 + 100 - 100, "500 since the window before began"
    assert taken(budget, 500.0, requests=9000) == WINDOW_S


def test_no_share_and_no_minimum_is_no_retry() -> None:
    assert taken(RetryBudget(share=0.0, least_per_s=0.0), 5.0, requests=10_000) == 0
