"""The progress of work in stages, on a terminal and elsewhere."""

import io

from rich.console import Console

from hpc_router.cli.stage_progress import PARTS, StageProgress


def shown(*, terminal: bool, reports: list[tuple[str, int, int]]) -> str:
    output = io.StringIO()
    with StageProgress(Console(file=output, force_terminal=terminal, width=100)) as progress:
        for report in reports:
            progress(*report)
    return output.getvalue()


def test_many_reports_are_a_few_lines() -> None:
    reports = [("encode", done, 1000) for done in range(1001)] + [("cluster", 0, 0), ("cluster", 3, 3)]
    lines = [line.partition(" s  ")[2] for line in shown(terminal=False, reports=reports).splitlines()]
    assert len(lines) == PARTS + 1 + 2
    assert (lines[0], lines[1], lines[PARTS]) == ("encode: 0 of 1000", "encode: 100 of 1000", "encode: 1000 of 1000")
    assert lines[-1] == "cluster: 3 of 3"


def test_a_terminal_shows_a_bar_for_each_stage() -> None:
    text = shown(terminal=True, reports=[("encode", 0, 20), ("encode", 20, 20), ("cluster", 1, 4)])
    assert "20/20" in text
    assert "1/4" in text
    assert " s  encode" not in text
