"""Every reader of JSON lines splits at line feeds only. Histograms cover every time limit that can be configured."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis import classifiers, results
from hpc_router.bench.prompts import read_prompts
from hpc_router.bench.traces import read_trace
from hpc_router.config.parsing import bounds_of
from hpc_router.config.schema import RouterConfig
from hpc_router.errors import ConfigError
from hpc_router.router.metrics import Metrics
from hpc_router.routing.training.dataset import read_corpus, read_rows
from hpc_router.state.atomic_files import lines_of

ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
"""The characters other than line feed and carriage return at which `str.splitlines` splits."""


def test_the_characters_are_those_that_splitlines_splits_at() -> None:
    assert len(ODD.splitlines()) == 9
    assert {c for c in map(chr, range(0x110000)) if len(f"a{c}b".splitlines()) > 1} == {"\n", "\r", *ODD[1::2]}


def written(folder: Path, *values: Any, end: str = "\n") -> Path:
    """Writes values as JSON lines, with characters unescaped where JSON allows it."""
    path = folder / "lines.jsonl"
    path.write_bytes("".join(json.dumps(value, ensure_ascii=False) + end for value in values).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", " \r\n\t\n"])
def test_readers_split_at_line_feeds_alone(tmp_path: Path, end: str) -> None:
    path = written(tmp_path, {"prompt": ODD, "domain": "x"}, {"prompt": "two", "domain": "y"}, end=end)
    assert [prompt.text for prompt in read_prompts(path)] == [ODD, "two"]
    assert [row.text for row in read_rows(path)] == [ODD, "two"]
    assert read_corpus(path) == [ODD, "two"]
    assert [row["prompt"] for row in classifiers.read(path)] == [ODD, "two"]


def test_a_passage_of_a_corpus_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(f"{ODD}\nnext", encoding="utf-8")
    assert read_corpus(path) == [ODD, "next"]


def test_a_trace_and_results_too(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, {"at_s": 2, "note": ODD}, {"at_s": 1}))
    assert [one.at_s for one in trace] == [1.0, 2.0]
    with pytest.raises(results.NoResultsError, match=r"lines\.jsonl:1: not a result record"):
        results.read(written(tmp_path, {"note": ODD}))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", '"x"', "null"])
def test_a_trace_has_finite_times(tmp_path: Path, value: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"at_s": {value}}}\n')
    with pytest.raises(ConfigError, match=r"trace\.jsonl"):
        read_trace(path)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"x\.jsonl:3: not UTF-8 \(byte 12 of the line\)"):
        list(lines_of(path))
    with pytest.raises(ConfigError, match=r"none\.jsonl: No such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_histograms_reach_beyond_every_limit() -> None:
    """A request may wait in the queue and for its first byte, each up to its configured limit."""
    limits = [bounds_of(RouterConfig, name) for name in ("queue_timeout_s", "first_byte_timeout_s", "idle_timeout_s")]
    longest = [bounds.high for bounds in limits if bounds is not None]
    assert len(longest) == len(limits)
    for spread in (Metrics().first_byte, Metrics().queued):
        edges = [sample.labels["le"] for sample in _samples(spread) if "le" in sample.labels]
        assert float(edges[-2]) > sum(longest[:2])
        assert float(edges[-2]) > max(longest)
        assert edges[-1] == "+Inf"
        assert [float(edge) for edge in edges] == sorted(float(edge) for edge in edges)


def _samples(spread: Any) -> list[Any]:
    spread.add(1.0, "math")
    [family] = spread.collect()
    return list(family.samples)
