"""One deployment with simulated engines, which serves all clients, and a tokenizer for the tools that want one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.endpoint import Endpoint, make_tokenizer, served


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with served(tmp_path_factory.mktemp("clients")) as one:
        yield one


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
