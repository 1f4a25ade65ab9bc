"""The requests of a point: lengths, arrivals, shares; all of them are determined by the seed."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.bench.config import Lengths, read_config
from hpc_router.bench.conversations import draw_length
from hpc_router.bench.overhead import split_users
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.workload import (
    Point,
    jobs_for,
    points_of,
    request_order,
    resize,
    share_of,
    workload,
)
from hpc_router.errors import ConfigError

PROMPTS = [BenchPrompt(f"prompt number {n}", "d") for n in range(5)]


def test_all_points_are_measured_once_per_repeat() -> None:
    config = read_config({"users": [1, 4], "repeats": 2})
    assert [(p.users, p.repeat) for p in points_of(config)] == [(1, 0), (4, 0), (1, 1), (4, 1)]
    assert [p.name for p in points_of(config)] == ["1 user", "4 users", "1 user, repeat 2", "4 users, repeat 2"]
    rates = read_config({"rates": [0.5, 2]})
    assert [p.rate_per_s for p in points_of(rates)] == [0.5, 2]


def test_a_poisson_process_has_its_rate() -> None:
    config = read_config({"rates": [50], "duration_s": 60})
    arrivals = workload(config, PROMPTS, Point(rate_per_s=50)).arrivals_s
    assert arrivals is not None
    assert arrivals == sorted(arrivals)
    in_a_minute = sum(at < 60 for at in arrivals)
    assert abs(in_a_minute - 3000) < 4 * 3000**0.5


def test_load_jobs_share_a_rate() -> None:
    config = read_config({"rates": [50], "duration_s": 60, "load_jobs": 4})
    works = [workload(config, PROMPTS, Point(rate_per_s=50), job=job) for job in range(4)]
    assert abs(sum(sum(at < 60 for at in work.arrivals_s or ()) for work in works) - 3000) < 4 * 3000**0.5
    assert works[0].arrivals_s != works[1].arrivals_s


def test_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at_s": 2}\n\n{"at_s": 0.5, "more": 1}\n')
    config = read_config({"trace": str(path)})
    (point,) = points_of(config)
    assert workload(config, PROMPTS, point).arrivals_s == [0.5, 2.0]
    path.write_text('{"at_s": 2}\n{"at": 1}\n')
    with pytest.raises(ConfigError, match=r"trace.jsonl:2: no number"):
        workload(config, PROMPTS, point)


def test_lengths_follow_their_distribution() -> None:
    config = read_config(
        {
            "input_words": {"kind": "uniform", "low": 20, "high": 30},
            "output_tokens": {"kind": "lognormal", "mean": 50, "sigma": 0.3, "low": 10, "high": 200},
        }
    )
    bodies = [json.loads(q.body) for q in workload(config, PROMPTS, Point(users=1)).bodies]
    words = [len(body["messages"][0]["content"].split()) for body in bodies]
    tokens = [body["max_tokens"] for body in bodies]
    assert (min(words), max(words)) == (20, 30)
    assert min(tokens) >= 10
    assert max(tokens) <= 200
    assert abs(sum(tokens) / len(tokens) - 50) < 2


def test_a_prompt_is_repeated_or_cut_to_its_length() -> None:
    assert resize("a b c", 7) == "a b c a b c a"
    assert resize("a b c", 2) == "a b"
    assert draw_length(random.Random(0), Lengths(kind="fixed", mean=12.4)) == 12


def test_think_times() -> None:
    steady = read_config({"think_s": 2.0, "think": "fixed"})
    assert workload(steady, PROMPTS, Point(users=1)).think_s == [2.0]
    think_s = workload(read_config({"think_s": 2.0}), PROMPTS, Point(users=1)).think_s
    assert think_s is not None
    assert abs(sum(think_s) / len(think_s) - 2.0) < 0.15
    assert workload(read_config({}), PROMPTS, Point(users=1)).think_s is None


def test_every_request_is_sent_once_before_any_repeats() -> None:
    first = request_order(30, "1:measured")
    assert set(Counter(first[:60]).values()) == {2}
    assert set(first[:30]) == set(range(30))
    assert first == request_order(30, "1:measured")
    assert first[:5] != request_order(30, "2:measured")[:5]


@given(total=st.integers(0, 5000), jobs=st.integers(1, 20))
def test_shares_add_up(total: int, jobs: int) -> None:
    shares = [share_of(total, job, jobs) for job in range(jobs)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("point", "requests", "jobs"),
    [(Point(users=1), None, 1), (Point(users=9), None, 4), (Point(users=9), 3, 3), (Point(rate_per_s=1.0), None, 4)],
)
def test_every_load_job_has_a_user_and_a_request(point: Point, requests: int | None, jobs: int) -> None:
    assert jobs_for(point, read_config({"load_jobs": 4, "requests": requests})) == jobs


@given(users=st.integers(1, 2000), weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=8))
def test_users_are_split_in_proportion_to_shares(users: int, weights: list[float]) -> None:
    shares = {str(n): weight for n, weight in enumerate(weights)}
    counts = split_users(users, shares)
    assert sum(counts.values()) == users
    for name, count in counts.items():
        assert abs(count - users * shares[name] / sum(weights)) < 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rates": [0]}, "bench.rates"),
        ({"rates": [1], "requests": 5}, "an open loop is limited by duration_s"),
        ({"users": [5000]}, "from 1 to 4000 per load job"),
        ({"think": "often"}, "valid: exponential, fixed"),
        ({"input_words": {"kind": "fix"}}, "did you mean 'fixed'"),
        ({"output_tokens": {"low": 9, "high": 3}}, "bench.output_tokens.low=9"),
        ({"trace": "/nope"}, "bench.trace"),
    ],
)
def test_invalid_values_raise_an_error_that_names_the_key(value: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(value)
