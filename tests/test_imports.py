"""Imports go one way, and each process loads only what it needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hpc_router

PACKAGE = Path(hpc_router.__file__).parent
LAYERS = [
    {"errors"},
    {"background", "environment", "fabric", "files", "logfile", "walltime"},
    {"auth", "schema", "wire"},
    {"as_written"},
    {"config"},
    {"adapters", "simulate"},
    {"checks", "compose", "frozen", "job_options", "provenance", "registry", "rundir"},
    {"filethread", "jobdir", "leader", "lease", "proof"},
    {"client", "errand", "follow"},
    {"relay", "routing"},
    {"expert", "router"},
    {"cluster"},
    {"bench"},
    {"arguments", "classify", "screen", "screen_classify", "cli"},
]


def layer(name: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"hpc_router.{name} has no place in LAYERS"
    return found[0]


def imports_of(path: Path) -> set[str]:
    """First names below `hpc_router` that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hpc_router.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hpc_router":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names if a.name != "__version__"}
    return found


def test_imports_go_one_way() -> None:
    """A module imports from its own layer or below; expert and router know nothing of each other."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for other in imports_of(path):
            same_layer_package = layer(other) == layer(own) and other != own and (PACKAGE / other).is_dir()
            if layer(other) > layer(own) or same_layer_package:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("hpc_router.router.main", ["torch", "vllm", "sklearn", "submitit", "transformers", "hpc_router.expert"]),
        ("hpc_router.expert.agent.agent", ["torch", "vllm", "submitit", "hpc_router.router", "hpc_router.routing"]),
    ],
)
def test_a_process_loads_only_what_it_needs(module: str, forbidden: list[str]) -> None:
    """In a fresh interpreter, as `sys.modules` shows it."""
    program = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
