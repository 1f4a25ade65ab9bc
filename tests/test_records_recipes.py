"""The recipes of docs/records.md read what a router writes."""

import re
from pathlib import Path
from typing import Any

import pytest

from hpc_router.state.run_directory import RunDir
from tests.router.fakes import a_deployment, a_router, a_run, fake_replica
from tests.router.support import chat, post, ready
from tests.support.needs import ROOT

RECIPES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/records.md").read_text(), re.DOTALL)


async def written(folder: Path) -> RunDir:
    """A run directory with records of requests that differ, and of feedback."""
    run = a_run(folder)
    async with (
        fake_replica(run, "math-0.g1"),
        fake_replica(run, "law-0.g1"),
        a_router(run, a_deployment("math", "law")) as router,
    ):
        await ready(router, 2)
        for number, expert in enumerate(("math", "math", "law", "unknown")):
            await post(router, chat(expert), **{"x-request-id": f"r-{number}"})
        await post(router, {"id": "r-0", "score": 1}, path="/feedback")
        await post(router, {"id": "r-2", "score": 0.5}, path="/feedback")
    return run


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.split("import ")[-1].split()[0])
async def test_a_recipe_reads_the_records(tmp_path: Path, recipe: str) -> None:
    variables: dict[str, Any] = {"run": (await written(tmp_path)).path}
    exec(recipe, variables)
    if "pd" in variables:
        assert set(variables["slow"].index) == {"math", "law"}
        assert dict(variables["scores"].set_index("id")["score"]) == {"r-0": 1.0, "r-2": 0.5}
        assert list(variables["by_margin"]) == [0.75]
    else:
        assert [row[:2] + row[3:] for row in variables["slow"]] == [("law", 1, 1), ("math", 2, 2)]
        assert all(p99_s > 0 for _, _, p99_s, _ in variables["slow"])


def test_both_libraries_have_a_recipe() -> None:
    assert [name for name in ("pandas", "duckdb") if any(f"import {name}" in recipe for recipe in RECIPES)] == [
        "pandas", "duckdb",
    ]  # fmt: skip
