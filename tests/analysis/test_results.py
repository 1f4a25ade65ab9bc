"""Records as series, confidence intervals over repeats, saturation, and files that are not results."""

import json
from pathlib import Path

import pytest

from analysis.results import NoResultsError, Value, read, saturation, series_of
from tests.analysis.records import result_record


def test_series_of_repeats() -> None:
    records = [
        result_record(users, ttft_s=0.1 + 0.01 * repeat, repeat=repeat) for users in (4, 1) for repeat in range(3)
    ]
    (one,) = series_of(records)
    assert (one.name, [point.load for point in one.points]) == ("four_small", [1, 4])
    value = one.points[0].value("ttft_s.p50", scale=1e3)
    assert value is not None
    assert value.mean == pytest.approx(110)
    assert value.repeats == 3
    # s = 10 ms, t(2) = 4.303
    assert value.half == pytest.approx(4.303 * 10 / 3**0.5)
    assert one.points[0].value("router.ttft_s.added_s") is None


def test_one_repeat_has_no_interval() -> None:
    assert Value.of([3.0]) == Value(3.0, None, 1)
    assert Value.of([]) is None


def test_each_kind_of_evidence_is_a_series_of_its_own() -> None:
    result = series_of([result_record(1, evidence="simulated"), result_record(1, evidence="cpu")])
    assert [one.evidence for one in result] == ["cpu", "simulated"]


def test_differences_are_part_of_the_name() -> None:
    other = result_record(1)
    other["provenance"]["overrides"] = ["experts.math.replicas=2", "cluster.gpus=4"]
    assert [one.name for one in series_of([result_record(1), other])] == [
        "four_small",
        "four_small experts.math.replicas=2",
    ]


def test_saturation_is_reached_only_if_throughput_levels_off() -> None:
    (grows,) = series_of([result_record(users) for users in (1, 10, 100)])
    result = saturation(grows)
    assert result is not None
    assert (result.load, result.reached) == (100, False)
    flat = [
        {**result_record(users), "tokens_per_s": tokens} for users, tokens in ((1, 50.0), (10, 480.0), (100, 500.0))
    ]
    result = saturation(series_of(flat)[0])
    assert result is not None
    assert (result.load, result.tokens_per_s, result.reached) == (10, 480.0, True)
    assert saturation(series_of([result_record(1)])[0]) is None


def test_reading_refuses_files_without_valid_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(result_record(1)) + "\n")
    (tmp_path / "a.requests.jsonl").write_text("{}\n")
    assert len(read(tmp_path)) == 1
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(NoResultsError, match=r"b.jsonl:1: not a result record"):
        read(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"schema": 1}\n')
    with pytest.raises(NoResultsError, match="schema 1; this version reads 2"):
        read(tmp_path)
    with pytest.raises(NoResultsError, match="no result records"):
        read(tmp_path / "a.requests.jsonl")
