"""Requirements of tests on the machine: without them a test is skipped with the reason. In CI, which installs them,
it fails."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VLLM_ENV = f"{{VLLM_CACHE_ROOT: {ROOT}/.venv-vllm/cache, TORCHDYNAMO_DISABLE: '1'}}"
"""Value of `cluster.env`. vLLM's cache of model classes is kept, which saves 17 s of CPU per start, and nothing is
compiled, which would delay the first response even of an eager engine."""


ENGINE_ENV = "TEST_ENV_{}"
"""Name of the variable with another environment of an engine, such as TEST_ENV_VLLM."""


def need(present: bool, what: str) -> None:
    """Skips the test, or fails it in CI, unless `present`."""
    if not present:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {what}")


def engine_python(name: str) -> Path:
    """The interpreter of an engine's environment, which `make engines` creates, or that of the environment which a
    variable names (`ENGINE_ENV`)."""
    folder = os.environ.get(ENGINE_ENV.format(name.upper())) or ROOT / f".venv-{name}"
    python = Path(folder) / "bin" / "python"
    need(python.exists(), f"{python.parent.parent.name} (make engines)")
    return python
