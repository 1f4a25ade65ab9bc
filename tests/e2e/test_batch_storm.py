"""100,000 lines through the loss of each process and a preemption: see `batch_storm`."""

from pathlib import Path

import pytest

from tests.e2e.batch_storm import storm

pytestmark = pytest.mark.long

LINES = 100_000


@pytest.mark.timeout(7200)
def test_a_batch_of_100_000_lines_through_every_loss(tmp_path: Path) -> None:
    result = storm(tmp_path, LINES, report=print)
    assert result.results == LINES, result.table()
    assert result.ordered, result.table()
    assert result.failed == 0
    assert len(result.events) == 6
    assert result.total_growth_mb < 20, result.table()
