"""Durations in every format that Slurm accepts."""

import math

import pytest

from hpc_router.config.walltime import walltime_s, walltime_text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("30", 30 * 60),
        ("30:15", 30 * 60 + 15),
        ("90:00", 90 * 60),
        ("01:30:15", 5415),
        ("48:00:00", 2 * 86400),
        ("1-0", 86400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:30", 2 * 86400 + 30),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("1h", None),
        ("1:2:3:4", None),
        ("1-", None),
        ("1-2:3:4:5", None),
        (" 30", None),
        ("30\n", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert walltime_s(text) == seconds


@pytest.mark.parametrize("text", ["00:00:59", "00:30:15", "23:59:59", "1-00:00:00", "30-12:00:01", "UNLIMITED"])
def test_a_clock_is_read_back(text: str) -> None:
    seconds = walltime_s(text)
    assert seconds is not None
    assert walltime_text(seconds) == text
