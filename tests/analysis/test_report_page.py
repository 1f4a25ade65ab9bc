"""The page in a browser: nothing is cut at the widths of phones, tablets and screens."""

from pathlib import Path

import pytest

from analysis import report
from tests.analysis.records import LONG, result_record, searched
from tests.support.page_widths import WIDTHS, cut_elements

pytestmark = [pytest.mark.e2e, pytest.mark.browser]


def test_nothing_is_cut(tmp_path: Path) -> None:
    experts = ("code", "questions-about-contracts-and-the-law-of-europe")
    records = [
        *(result_record(users, topology=LONG, repeat=r, ttft_s=123.456 + r, added_s=0.00234, experts=experts)
          for users in (1, 1000) for r in range(3)),
        *(result_record(4, topology=f"four_small_{n}") for n in range(3)),
        *(searched(rate, good=rate < 20) for rate in (1.0, 11.31, 22.63)),
    ]  # fmt: skip
    cut = cut_elements(report.report(records, title="A report"), tmp_path)
    assert cut == {str(width): [] for width in WIDTHS}
