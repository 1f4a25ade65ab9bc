"""The documents say what the code does: links lead somewhere, named tests exist, generated pages are current."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from docs import configuration, states
from hpc_router.cli.main import VERBS
from hpc_router.config.compose import load_deployment
from tests.support.needs import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "findings").glob("*.md")], key=lambda path: path.name
)
PACKAGE = ROOT / "hpc_router"
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


def named_paths(page: Path) -> set[str]:
    """The paths in code spans that begin with a folder of the repository or of the package. Placeholders such as
    `<name>` and `NAME` are left out."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    words = [word.partition("::")[0].rstrip(",;") for span in re.findall(r"`([^`]+)`", text) for word in span.split()]
    folders = {path.name for root in (ROOT, PACKAGE) for path in root.iterdir() if path.is_dir()} - {"runs"}
    paths = {word for word in words if "/" in word and word.partition("/")[0] in folders}
    return {path for path in paths if not re.search(r"<|(^|/)[A-Z]+\b(?!\.md)", path)}


def matches(path: str, *, roots: Sequence[Path] = (ROOT, PACKAGE)) -> bool:
    """Whether a file, a folder or a module without its suffix has this path; `*` matches any name."""
    return any(any(root.glob(name)) for root in roots for name in (path.rstrip("/"), f"{path}.py"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "findings"], ids=lambda path: path.name)
def test_paths_in_code_spans_exist(page: Path) -> None:
    assert [path for path in sorted(named_paths(page)) if not matches(path)] == []


def test_a_path_that_was_renamed_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`router/worker/link`, `python docs/no.py --x`, `conf/bench/NAME.yaml`, `logs/<router>.log`, `errors`"
    )
    assert named_paths(page) == {"router/worker/link", "docs/no.py"}
    assert not any(map(matches, named_paths(page)))
    assert matches("router/worker/gateway")
    assert matches("router/worker/")
    assert matches("conf/topology/llama3_*")


def test_the_architecture_names_folders_and_code_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    paragraphs = re.findall(r"^\*\*`(\w+)/`\*\*(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    described = {folder for folder, _ in paragraphs}
    assert described == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for folder, paragraph in paragraphs:
        for inner in re.findall(r"`(\w+/)`", paragraph):
            assert matches(inner, roots=(PACKAGE / folder, ROOT)), f"{folder}: {inner}"
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for name in re.findall(r"`([A-Z]\w*[a-z]\w*(?:\.\w+)?|(?!SLURM_)[A-Z_]{5,})`", text):
        for part in name.split("."):
            assert re.search(rf"\b(class|def) {part}\b|^{part}\b.* = ", source, re.MULTILINE), name


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
