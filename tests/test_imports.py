"""Each process loads only what it needs. The import-linter contracts in pyproject.toml hold the layers."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import hpc_router


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("hpc_router.router.main", ["torch", "vllm", "sklearn", "submitit", "transformers", "hpc_router.expert"]),
        ("hpc_router.connect.main", ["openai", "aiohttp", "submitit", "torch", "hydra", "hpc_router.router"]),
        ("launch.train_classifier", ["torch", "vllm", "sklearn", "submitit", "aiohttp", "hpc_router.cluster.commands"]),
        ("hpc_router.cluster.control_loop.loop", ["torch", "aiohttp", "hydra", "numpy", "submitit", "rich"]),
        ("hpc_router.cli.tables", ["torch", "aiohttp", "hydra", "numpy", "submitit"]),
        (
            "hpc_router.expert.job",
            ["torch", "vllm", "submitit", "aiohttp", "hydra", "numpy", "hpc_router.router", "hpc_router.routing"],
        ),
    ],
)
def test_a_process_loads_only_what_it_needs(module: str, forbidden: list[str]) -> None:
    """In a fresh interpreter, as `sys.modules` shows it."""
    program = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_class_name_stands_once_in_the_package() -> None:
    """So that a name, in a traceback or a search, means one thing."""
    package = Path(hpc_router.__file__).parent
    modules: dict[str, list[str]] = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                modules[node.name].append(str(path.relative_to(package)))
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}


def test_no_text_is_read_as_markup() -> None:
    """rich would drop `[train]` from a message, and raise at a path with `[/x]` in it."""
    root = Path(hpc_router.__file__).parents[1]
    calls = [
        (
            f"{path.relative_to(root)}:{node.lineno}",
            {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
        )
        for folder in ("hpc_router", "launch", "analysis")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Console", "TextColumn")
    ]
    assert len(calls) > 10
    assert [place for place, options in calls if options.get("markup") != "False"] == []


def test_no_test_imports_another_test_file() -> None:
    """What several test files use stands in a support module."""
    tests = Path(__file__).parent
    found = [
        f"{path.relative_to(tests)}: {node.module}"
        for path in tests.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and any(part.startswith("test_") for part in (node.module or "").split("."))
    ]
    assert found == []
