"""One deployment with simulated engines, which serves all clients."""

from collections.abc import Iterator

import pytest

from tests.clients.endpoint import Endpoint, served


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with served(tmp_path_factory.mktemp("clients")) as one:
        yield one
