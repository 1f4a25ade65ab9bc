"""What a cluster takes of the machine is free before, and what it removes is its own."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import claim
from tests.slurm.cluster import SlurmCluster
from tests.slurm.host import SlurmClusterError

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("machine")]


def bridges() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


@pytest.fixture
def foreign() -> Iterator[int]:
    """The lowest free number, of which another starter has the bridge, such as one in a container with a /run of its
    own."""
    with claim._locked():
        number = next(n for n in claim.NUMBERS if n not in claim.claims() and claim.bridge_of(n) not in bridges())
        subprocess.run(["ip", "link", "add", claim.bridge_of(number), "type", "bridge"], check=True)
    yield number
    subprocess.run(["ip", "link", "delete", claim.bridge_of(number)], check=True)


def test_a_number_whose_bridge_exists_is_left_out(foreign: int) -> None:
    with SlurmCluster(accounting=False) as cluster:
        assert cluster.number > foreign
        assert claim.bridge_of(foreign) in bridges()
    assert claim.bridge_of(foreign) in bridges()
    assert claim.bridge_of(cluster.number) not in bridges()


def test_a_failed_up_removes_only_what_it_made(foreign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other number is left."""
    monkeypatch.setattr(claim, "NUMBERS", (foreign,))
    failed = SlurmCluster(accounting=False)
    with pytest.raises(SlurmClusterError, match="no number"):
        failed.up(owned=True)
    assert claim.bridge_of(foreign) in bridges()
    assert foreign not in claim.claims()
    assert not failed.folder.exists()


def test_a_claim_whose_starter_made_no_bridge_yet_removes_no_other(foreign: int) -> None:
    """As after SIGKILL between the two steps."""
    folder = claim.make_folder(None)
    with claim._locked():
        (claim.CLAIMS / str(foreign)).symlink_to(folder)
    assert claim.release(folder)
    assert claim.bridge_of(foreign) in bridges()
    assert foreign not in claim.claims()


def test_a_bridge_that_appears_after_the_choice(foreign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another starter was faster: the next number is taken."""
    monkeypatch.setattr(claim, "NUMBERS", range(foreign, foreign + 50))
    looks = iter([False])
    real = claim._has_bridge
    monkeypatch.setattr(claim, "_has_bridge", lambda number: next(looks, None) or real(number))
    folder = claim.make_folder(None)
    try:
        assert claim.claim(folder) > foreign
        assert claim.bridge_of(foreign) in bridges()
    finally:
        assert claim.release(folder)
    assert claim.bridge_of(foreign) in bridges()
