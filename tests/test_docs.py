"""The documents say what the code does: links lead somewhere, named tests exist, generated pages are current."""

import re
import textwrap
from pathlib import Path

import pytest

from docs import configuration, states
from hpc_router.cli.main import VERBS
from hpc_router.config.compose import load_deployment
from tests.support.needs import ROOT

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


def test_the_states_page_is_current() -> None:
    assert states.PAGE.read_text() == states.page(), "run `python docs/states.py`"


def topologies() -> list[tuple[str, str]]:
    """Every example topology of the documents, with the name of its page."""
    blocks = re.compile(r"^ *```yaml\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    found = [(page.name, textwrap.dedent(block)) for page in PAGES for block in blocks.findall(page.read_text())]
    return [(name, block) for name, block in found if block.startswith("# @package _global_")]


@pytest.mark.parametrize("example", topologies(), ids=lambda example: str(example[0]))
def test_example_topologies_compose(example: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "topology").mkdir()
    (tmp_path / "topology" / "mine.yaml").write_text(example[1])
    deployment = load_deployment(["topology=mine", "cluster.gpus=8"], config_dir=tmp_path)
    assert deployment.policy.fallback in deployment.experts
