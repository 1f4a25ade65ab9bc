"""The benchmark of a scrape: it measures the whole exposition of as many replicas as it is told."""

import json

import pytest

from hpc_router.bench.scrape import measure_scrapes
from hpc_router.cli.main import main


def test_it_measures_scrapes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--replicas", "9", "--experts", "3", "--workers", "2", "--scrapes", "4", "--json"]
    assert main(["bench", "scrape", *words]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert (cost["replicas"], cost["experts"], cost["workers"], cost["scrapes"]) == (9, 3, 2, 4)
    assert 0 < cost["median_ms"] <= cost["p90_ms"]
    more = measure_scrapes(replicas=18, experts=3, workers=2, scrapes=1)
    assert more.kilobytes > cost["kilobytes"] > 1


def test_nothing_to_measure_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scrape", "--replicas", "0"]) == 2
    assert "at least one replica" in capsys.readouterr().err
