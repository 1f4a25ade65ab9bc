"""The router's address in the share folder: when it is written, and by which router."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.config.schema import RouterConfig
from hpc_router.router.control.registry_file import RegistryFile
from hpc_router.router.control.shared_address import SharedAddress, shared_address
from hpc_router.state.io_thread import FileThread
from hpc_router.state.registry import Record, RecordKind, State, publish, replica_name, withdraw
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.share_dir import open_share

GROUP = str(os.getgid())


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "share"


@pytest.fixture
def files() -> Iterator[FileThread]:
    files = FileThread("test")
    yield files
    files.close(timeout_s=5)


def a_router(generation: int) -> Record:
    url = f"http://127.0.0.1:{generation}"
    name = replica_name("router", 0, generation)
    return Record(RecordKind.ROUTER, name, url, State.READY, {}, generation=generation, nonce="n", beat=1)


def address_of(run: RunDir, path: Path) -> SharedAddress:
    found = shared_address(run, RouterConfig(share_dir=str(path), share_group=GROUP, max_body_mb=7.0))
    assert found is not None
    return found


def named(path: Path) -> str | None:
    content = open_share(path).router_file().read()
    assert content is not None
    assert content.max_body_mb == 7.0
    return None if content.router is None else content.router.replica


def test_without_a_folder_nothing_is_shared(run: RunDir) -> None:
    assert shared_address(run, RouterConfig()) is None


def test_it_is_written_once_and_again_if_it_was_changed(run: RunDir, path: Path) -> None:
    address = address_of(run, path)
    address.keep(a_router(2))
    written = (path / "router.json").stat().st_ino
    address.keep(replace(a_router(2), beat=7))
    assert (path / "router.json").stat().st_ino == written, "a heartbeat is not written"
    predecessor = address_of(run, path)
    predecessor.keep(a_router(1))  # it was suspended before its last write
    assert named(path) == "router-0.g1"
    address.keep(a_router(2))
    assert named(path) == "router-0.g2"
    (path / "router.json").unlink()
    address.keep(a_router(2))
    assert named(path) == "router-0.g2"


def test_only_the_leading_router_writes_it(run: RunDir, path: Path, files: FileThread) -> None:
    """A handover: the successor writes its address, and the predecessor leaves it alone when it ends."""
    first, second = (RegistryFile(run, f"router-0.g{number}", files, address_of(run, path)) for number in (1, 2))
    publish(run.registry, a_router(1))
    first.keep({"router-0.g1": a_router(1)})
    both = {f"router-0.g{number}": a_router(number) for number in (1, 2)}
    publish(run.registry, a_router(2))
    for keeper in (first, second):
        keeper.keep(both)
    withdraw(run.registry, "router-0.g1")
    first.leave()
    files.close(timeout_s=5)
    assert named(path) == "router-0.g2"


def test_the_last_router_removes_its_address(run: RunDir, path: Path, files: FileThread) -> None:
    keeper = RegistryFile(run, "router-0.g2", files, address_of(run, path))
    publish(run.registry, a_router(2))
    keeper.keep({"router-0.g2": a_router(2)})
    withdraw(run.registry, "router-0.g2")
    keeper.leave()
    files.close(timeout_s=5)
    assert named(path) is None


def test_the_folder_of_another_run_is_left_alone(run: RunDir, path: Path, tmp_path: Path) -> None:
    address_of(make_run(tmp_path / "other"), path).keep(a_router(5))
    address = address_of(run, path)
    address.keep(a_router(2))
    assert named(path) == "router-0.g5"
    assert "belongs to the run" in str(address.trouble)
    address.leave()
    assert named(path) == "router-0.g5"


def test_a_folder_that_cannot_be_used_is_reported_until_it_can(run: RunDir, path: Path) -> None:
    path.write_text("")
    address = address_of(run, path)
    address.keep(a_router(2))
    assert "is not a folder" in str(address.trouble)
    path.unlink()
    address.keep(a_router(2))
    assert address.trouble is None
    assert named(path) == "router-0.g2"
