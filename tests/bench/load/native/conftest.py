"""The programs require a C compiler."""

import pytest

from hpc_router.bench.load.native.build import compiler
from tests.support.needs import need


@pytest.fixture(autouse=True, scope="session")
def _a_compiler() -> None:
    need(compiler() is not None, "a C compiler (gcc)")
