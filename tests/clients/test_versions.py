"""The table of tested clients in docs/clients.md names the versions that the tests install."""

import json
import re

from tests.support.needs import ROOT

NAMES = {"lm-eval": "lm_eval"}
"""Names of the table that pip writes otherwise."""


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / ".ci/constraints" / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)


def listed() -> dict[str, str]:
    """Client, with `npm:` in front where it is one of npm -> version."""
    table = (ROOT / "docs/clients.md").read_text().partition("## Tested clients")[2]
    rows = re.findall(r"^\| `(\S+)`(.*?) \| ([\d.]+) \|", table, re.MULTILINE)
    return {("npm:" if "npm" in kind else "") + name: version for name, kind, version in rows}


def test_the_documented_versions_are_the_installed_ones() -> None:
    project = json.loads((ROOT / "tests/clients/npm/package.json").read_text())["dependencies"]
    lock = json.loads((ROOT / "tests/clients/npm/package-lock.json").read_text())["packages"]
    assert {name: lock[f"node_modules/{name}"]["version"] for name in project} == project
    installed = pins("dev") | pins("instructor") | pins("clients") | {f"npm:{k}": v for k, v in project.items()}
    found = {name: installed[NAMES.get(name, name)] for name in listed()}
    assert found == listed()
    assert len(found) == 12


def test_one_version_of_the_official_clients_is_tested() -> None:
    for name in ("openai", "anthropic"):
        assert pins("clients")[name] == pins("dev")[name]


def test_the_lock_file_names_no_registry() -> None:
    assert '"resolved"' not in (ROOT / "tests/clients/npm/package-lock.json").read_text()
