"""Each process loads only what it needs. The import-linter contracts in pyproject.toml hold the layers."""

import subprocess
import sys

import pytest


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
