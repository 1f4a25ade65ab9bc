"""The options, the order of the windows and the report of `hpc-router bench pages`."""

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hpc_router.bench.open_pages import OpenPagesOptions, OpenPagesResults, PageWindow, open_page, order_of_round
from hpc_router.cli.main import main
from hpc_router.errors import ConfigError, LaunchError
from tests.router.fakes import a_deployment, a_router, a_run
from tests.support.waiting import GUARD_S


@pytest.mark.parametrize(
    "wrong", [{"streams": 0}, {"streams": 4001}, {"rate": 0.0}, {"seconds": 0.0}, {"rounds": 0}, {"pages": 101}]
)
def test_invalid_options_name_the_valid_range(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"--{name} .*: between"):
        OpenPagesOptions(**wrong).checked()
    assert OpenPagesOptions().checked().wanted == (0, 1, 10)
    assert OpenPagesOptions(pages=1).checked().wanted == (0, 1)


def test_an_invalid_option_is_an_error_of_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pages", "--pages", "200"]) == 2
    assert "between 1 and 100" in capsys.readouterr().err


def test_each_round_begins_with_another_number_of_pages() -> None:
    assert [order_of_round((0, 1, 10), number) for number in range(4)] == [
        [0, 1, 10], [1, 10, 0], [10, 0, 1], [0, 1, 10],
    ]  # fmt: skip


def window(number: int, pages: int, cpu: float, p99_ms: float) -> PageWindow:
    return PageWindow(number, pages, cpu, 1.0, p99_ms, 100, 0.0)


def test_pages_are_compared_within_each_round() -> None:
    """In the second round the machine is half as fast."""
    windows = [
        window(0, 0, 0.20, 2.0), window(0, 1, 0.21, 2.0), window(0, 10, 0.22, 3.0),
        window(1, 1, 0.41, 4.0), window(1, 10, 0.44, 4.4), window(1, 0, 0.40, 4.0),
        window(2, 10, 0.23, 2.0), window(2, 0, 0.20, 2.0), window(2, 1, 0.22, 2.5),
    ]  # fmt: skip
    results = OpenPagesResults(OpenPagesOptions(rounds=3), windows, {"timeout": 2})
    assert list(results.lines()) == [
        "1000 streams x 10 events/s, 3 windows of 5 s with each number of pages; medians, and range over the rounds",
        "0 pages: 20.0% of a core, hop p50 1.00 ms, p99 2.00 ms",
        "1 page: 22.0% of a core, hop p50 1.00 ms, p99 2.50 ms; beside none: +1.0 (+1.0 to +2.0) points of CPU, "
        "p99 x 1.00 (1.00 to 1.25)",
        "10 pages: 23.0% of a core, hop p50 1.00 ms, p99 3.00 ms; beside none: +3.0 (+2.0 to +4.0) points of CPU, "
        "p99 x 1.10 (1.00 to 1.50)",
        "failed: 2 x timeout",
    ]
    assert json.loads(json.dumps(results.to_json()))["windows"][0]["hop_ms_p99"] == 2.0


async def test_a_page_reads_the_overviews_of_a_router_and_leaves(tmp_path: Path) -> None:
    async with a_router(a_run(tmp_path), a_deployment("math")) as router:
        port = int(router.url.rpartition(":")[2])
        with ExitStack() as stack:
            pages = [
                await asyncio.to_thread(stack.enter_context, open_page(port, router.token)) for _ in range(2)
            ]  # fmt: skip
            async with asyncio.timeout(GUARD_S):
                await asyncio.gather(*(asyncio.to_thread(page.wait) for page in pages))
            assert all(page.open and page.count for page in pages)
            await asyncio.to_thread(stack.close)
        assert not any(page.open for page in pages)
        with pytest.raises(LaunchError, match="status 401"):
            await asyncio.to_thread(open_page(port, "another").__enter__)
