"""Traces: arrival times, and requests in Mooncake's format."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_router.bench.config import read_config
from hpc_router.bench.prompts import built_in
from hpc_router.bench.traces import read_trace
from hpc_router.bench.workload import Point, Workload, workload
from hpc_router.errors import ConfigError

TRACE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 40, "hash_ids": [1, 2, 3]},
    {"timestamp": 3000, "input_length": 1500, "output_length": 8, "hash_ids": [1, 2, 4]},
    {"timestamp": 1500, "input_length": 500, "output_length": 0, "hash_ids": [9]},
]


def written(folder: Path, *lines: dict[str, Any]) -> str:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def replayed(path: str, **more: Any) -> Workload:
    config = read_config({"trace": path, "duration_s": 10, **more})
    return workload(config, built_in(), Point(trace="trace.jsonl"))


def prompts(work: Workload) -> list[list[str]]:
    return [json.loads(one.body)["messages"][0]["content"].split() for one in work.bodies]


def test_equal_hashes_are_equal_text_and_lengths_are_those_of_the_trace(tmp_path: Path) -> None:
    work = replayed(written(tmp_path, *TRACE))
    first, short, second = prompts(work)
    assert [len(first), len(short), len(second)] == [1100, 500, 1500]
    assert first[:1024] == second[:1024]
    assert first[1024:] != second[1024:1100]
    assert short != first[:500]
    assert [json.loads(one.body)["max_tokens"] for one in work.bodies] == [40, 1, 8]
    assert work.arrivals_s == [0.0, 1.5, 3.0]
    assert work.chains is not None
    assert [(step.request, step.last) for step in work.chains] == [(0, True), (1, True), (2, True)]


def test_a_trace_can_be_faster_and_shorter(tmp_path: Path) -> None:
    work = replayed(written(tmp_path, *TRACE), trace_speed=2, trace_block=64)
    first, short, second = prompts(work)
    assert [len(first), len(short), len(second)] == [138, 62, 188]
    assert first[:128] == second[:128]
    assert work.arrivals_s == [0.0, 0.75, 1.5]


def test_what_arrives_after_the_load_is_left_out(tmp_path: Path) -> None:
    late = {**TRACE[0], "timestamp": 1e9}
    assert len(replayed(written(tmp_path, *TRACE, late)).bodies) == 3


def test_arrival_times_alone_use_the_prompts(tmp_path: Path) -> None:
    work = replayed(written(tmp_path, {"at_s": 2}, {"at_s": 0.5}), trace_speed=0.5)
    assert (work.arrivals_s, work.chains) == ([1.0, 4.0], None)


@pytest.mark.parametrize(
    "lines",
    [
        [{"timestamp": 0, "input_length": 1100, "output_length": 1, "hash_ids": [1]}],
        [{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}],
        [{"timestamp": 0, "output_length": 1, "hash_ids": [1]}],
        [TRACE[0], {"at_s": 1}],
    ],
    ids=["too few hashes", "no prompt", "no length", "two formats"],
)
def test_a_line_that_cannot_be_replayed_is_named(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    path = written(tmp_path, *lines)
    with pytest.raises(ConfigError, match=str(path)):
        read_trace(Path(path))
