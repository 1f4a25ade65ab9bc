"""The load of `bench balance`: the same for every policy, and an upper bound of what caches can find in it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.bench.balance.load import mixed_load, prompt_tokens, upper_bound
from hpc_router.bench.balance.options import BalanceOptions
from hpc_router.bench.figures import MeasurementPart, Observation
from hpc_router.bench.prompts import built_in
from hpc_router.errors import ConfigError

SMALL = BalanceOptions(
    Path(), rates={"shared": 2.0, "chat": 1.0, "different": 5.0}, seconds=4.0, warmup_s=1.0, slowdown=3.0
)


def trace(folder: Path) -> Path:
    rows = [
        {"timestamp": 1500 * n, "input_length": 1100, "output_length": 80, "hash_ids": [0, n, n + 100]}
        for n in range(40)
    ]
    path = folder / "trace.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_every_policy_gets_the_same_requests_at_the_same_times(tmp_path: Path) -> None:
    options = replace(SMALL, trace=trace(tmp_path))
    first, again = (mixed_load(options, built_in()) for _ in range(2))
    assert first == again
    assert {body.load_class for body in first.bodies} == {"shared", "chat", "mooncake"}
    assert first.arrivals_s is not None
    assert list(first.arrivals_s) == sorted(first.arrivals_s)
    assert first.chains is not None
    assert len(first.arrivals_s) == sum(step.last for step in first.chains)


def test_times_are_those_of_the_engines_and_take_longer_by_the_slowdown() -> None:
    slow, fast = (mixed_load(replace(SMALL, slowdown=factor), built_in()) for factor in (3.0, 1.0))
    assert [body.body for body in slow.bodies] == [body.body for body in fast.bodies]
    assert slow.arrivals_s == pytest.approx([3 * at_s for at_s in fast.arrivals_s or ()])
    assert [one.pause_s for one in slow.chains or ()] == pytest.approx([3 * one.pause_s for one in fast.chains or ()])


def test_the_upper_bound_is_what_one_large_cache_finds() -> None:
    work = mixed_load(SMALL, built_in())
    seen = [
        Observation(part=MeasurementPart.MEASURED, user=0, started_s=float(at), ended_s=at + 1.0, question=at)
        for at in range(len(work.bodies))
    ]
    everything = upper_bound(work, seen, blocks=10**6)
    total = sum(len(prompt_tokens(body.body)) for body in work.bodies)
    assert 0.3 * total < everything < total
    assert upper_bound(work, seen, blocks=200) < everything
    failed = [replace(one, error="timeout") for one in seen]
    assert upper_bound(work, failed, blocks=10**6) == 0
    assert upper_bound(work, [replace(one, question=0) for one in seen[:2]], blocks=10**6) > 0


def test_different_prompts_share_nothing(tmp_path: Path) -> None:
    work = mixed_load(replace(SMALL, loads=("different",), trace=trace(tmp_path)), built_in())
    assert {body.load_class for body in work.bodies} == {"different"}
    beginnings = [tuple(prompt_tokens(body.body)[:16]) for body in work.bodies]
    assert len(set(beginnings)) == len(beginnings) > 10


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        replace(SMALL, trace=tmp_path / "missing").checked()
    with pytest.raises(ConfigError, match="no such load"):
        replace(SMALL, loads=("chats",)).checked()
    with pytest.raises(ConfigError, match="at least 2"):
        replace(SMALL, replicas=1).checked()
    assert SMALL.checked() == SMALL
