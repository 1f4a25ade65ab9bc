"""The documents say what the code does: links lead somewhere, named tests exist, generated pages are current."""

import re
from pathlib import Path

import pytest

from docs import configuration
from hpc_router.cli import VERBS
from tests.needs import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "findings").glob("*.md")], key=lambda path: path.name
)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pages
def test_tests_that_are_named_exist(page: Path) -> None:
    for name, _, test in re.findall(r"\b(tests/[\w/]+\.py)(::(\w+))?", page.read_text()):
        assert (ROOT / name).exists(), name
        assert not test or re.search(rf"\b(def|class) {test}\b", (ROOT / name).read_text()), f"{name}::{test}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_readme_lists_every_verb() -> None:
    table = (ROOT / "README.md").read_text().partition("## Verbs")[2].partition("##")[0]
    assert set(re.findall(r"\| `(\w+)` \|", table)) == set(VERBS)


def test_the_configuration_reference_is_current() -> None:
    assert configuration.PAGE.read_text() == configuration.page(), "run `python docs/configuration.py`"
