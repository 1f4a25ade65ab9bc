"""Only regressions beyond tolerance and noise are flagged."""

import json
from pathlib import Path

import pytest

from analysis.compare import compare, main
from analysis.results import series_of
from tests.analysis.records import result_record


def worse_of(before: list[dict[str, object]], after: list[dict[str, object]], tolerance: float = 0.05) -> set[str]:
    result = compare(series_of(before), series_of(after), tolerance=tolerance)
    return {change.figure for change in result.changes if change.worse}


def test_a_slower_first_token_is_worse_and_a_faster_one_is_not() -> None:
    slow, fast = [result_record(4, ttft_s=0.2)], [result_record(4, ttft_s=0.1)]
    assert "TTFT p50 [ms]" in worse_of(fast, slow)
    assert worse_of(slow, fast) == set()


def test_less_throughput_is_worse() -> None:
    less = [{**result_record(4), "tokens_per_s": 1.0}]
    assert worse_of([result_record(4)], less) == {"system [tokens/s]"}
    assert worse_of(less, [result_record(4)]) == set()


def test_a_change_within_the_tolerance_does_not_count() -> None:
    assert worse_of([result_record(4, ttft_s=0.1)], [result_record(4, ttft_s=0.1049)]) == set()


def test_a_change_within_the_noise_does_not_count() -> None:
    """With two repeats that differ much, the confidence intervals overlap."""
    before = [result_record(4, ttft_s=ttft, repeat=n) for n, ttft in enumerate((0.10, 0.20))]
    after = [result_record(4, ttft_s=ttft, repeat=n) for n, ttft in enumerate((0.15, 0.25))]
    assert worse_of(before, after) == set()
    steady = [result_record(4, ttft_s=ttft, repeat=n) for n, ttft in enumerate((0.100, 0.101))]
    slower = [result_record(4, ttft_s=ttft, repeat=n) for n, ttft in enumerate((0.150, 0.151))]
    assert "TTFT p50 [ms]" in worse_of(steady, slower)


def test_points_that_cannot_be_compared_are_listed() -> None:
    result = compare(
        series_of([result_record(1), result_record(4), result_record(1, topology="gone")]),
        series_of([result_record(1, invalid=("why",)), result_record(8), result_record(1, topology="new")]),
        tolerance=0.05,
    )
    assert result.changes == []
    reasons = " | ".join(result.not_compared)
    assert "gone (simulated): only in the first" in reasons
    assert "four_small at 1: invalid in the second" in reasons
    assert "at 4: only in the first" in reasons
    assert "at 8: only in the second" in reasons
    assert "new (simulated): only in the second" in reasons


def test_the_command_s_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, ttft_s in (("before", 0.1), ("after", 0.2)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(result_record(4, ttft_s=ttft_s)) + "\n")
    before, after = str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl")
    assert main([before, after]) == 1
    assert "WORSE" in capsys.readouterr().out
    assert main([after, before]) == 0
    assert main([before, before]) == 0
    assert main([before, str(tmp_path / "none")]) == 2
