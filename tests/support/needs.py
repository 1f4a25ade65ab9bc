"""What a test needs of the machine; absent, it skips with the reason, and in CI, which installs it, it fails."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VLLM_ENV = f"{{VLLM_CACHE_ROOT: {ROOT}/.venv-vllm/cache, TORCHDYNAMO_DISABLE: '1'}}"
"""For `cluster.env`: what vLLM has found out of a model's class stays for the next start, which is 17 s of CPU less;
and nothing is compiled, for which even an eager engine's first answer would wait."""


def need(present: bool, what: str) -> None:
    if not present:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {what}")


def engine_python(name: str) -> Path:
    """The interpreter of an engine's environment, which `make engines` makes."""
    python = ROOT / f".venv-{name}" / "bin" / "python"
    need(python.exists(), f"{python.parent.parent.name} (make engines)")
    return python
