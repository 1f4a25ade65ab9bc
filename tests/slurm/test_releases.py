"""Roots of other releases: made once, by one maker, complete or not at all. Clusters run in them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import releases
from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.configuration import Proctrack
from tests.slurm.host import SlurmClusterError
from tests.support.needs import ROOT
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("machine")]
DEBOOTSTRAP = """\
#!/bin/sh
echo "$$" >>{folder}/calls
while [ ! -e {folder}/go ]; do sleep 0.05; done
for target in "$@"; do [ "${{target#{cache}/}}" = "$target" ] || break; done
cp -al {there}/. "$target"
"""


@pytest.fixture(scope="module")
def there() -> releases.Root:
    """A root of a real release."""
    try:
        return releases.root_of(releases.newest())
    except SlurmClusterError as error:
        pytest.skip(str(error))


@pytest.fixture
def making(there: releases.Root, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an empty cache, whose debootstrap waits for `go` and then links the files of the real root."""
    folder = there.folder.with_name(f"test-{os.getpid()}")
    cache = folder / "hpc-router" / "slurm-releases"
    tool = folder / "bin" / "debootstrap"
    tool.parent.mkdir(parents=True)
    tool.write_text(DEBOOTSTRAP.format(folder=folder, cache=cache, there=there.folder))
    tool.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    yield folder
    shutil.rmtree(folder)


def maker() -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "tests.slurm.releases", "trixie"]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def made(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "hpc-router" / "slurm-releases").iterdir() if path.is_dir())


def test_two_makers_at_once_make_one_root(making: Path) -> None:
    with maker() as one, maker() as other:
        eventually_sync((making / "calls").exists)
        (making / "go").touch()
        said = [process.communicate(timeout=60)[0] for process in (one, other)]
    assert said[0] == said[1]
    assert re.search(r"/trixie-\w{8}: Slurm \d\d\.\d\d\n$", said[0])
    assert len((making / "calls").read_text().split()) == 1
    assert len(made(making)) == 1


def test_a_killed_maker_leaves_nothing_that_is_used(making: Path) -> None:
    """Its debootstrap ends with it, and the next maker begins again."""
    with maker() as killed:
        eventually_sync((making / "calls").exists)
        (left,) = made(making)
        assert left.startswith(".trixie-")
        killed.kill()
    eventually_sync(lambda: not with_word(left))
    (making / "go").touch()
    with maker() as following:
        assert "Slurm" in following.communicate(timeout=60)[0]
    (name,) = made(making)
    assert name.startswith("trixie-")
    assert len((making / "calls").read_text().split()) == 2


def test_a_damaged_root_is_made_again(making: Path) -> None:
    (making / "go").touch()
    root = releases.root_of("trixie")
    assert releases.root_of("trixie").folder == root.folder
    assert len((making / "calls").read_text().split()) == 1
    (root.folder / "usr/sbin/slurmctld").unlink()  # one of two links
    releases.root_of("trixie")
    assert len((making / "calls").read_text().split()) == 2
    assert len(made(making)) == 1


def test_a_debootstrap_that_fails_says_why_and_leaves_nothing(making: Path) -> None:
    (making / "bin" / "debootstrap").write_text("#!/bin/sh\necho 'E: no such package' >&2\nexit 1\n")
    with pytest.raises(SlurmClusterError, match=r"could not make trixie: .*no such package"):
        releases.root_of("trixie")
    assert made(making) == []


def test_a_cluster_of_the_release(there: releases.Root) -> None:
    """Its nodes and this machine use the release's Slurm. The root itself is not written to."""
    proctrack: Proctrack = "linuxproc" if lacking("cgroup") else "cgroup"
    name = f"written-{os.getpid()}"
    with SlurmCluster(release=there.release, proctrack=proctrack) as cluster:
        environment = {**os.environ, **cluster.environment}
        assert cluster.version == there.version
        outside = ["sbatch", "--version"]
        assert releases.version_of(subprocess.check_output(outside, env=environment, text=True)) == there.version
        said = cluster.run(["srun", "--nodelist=n2", "sh", "-c", f"touch /etc/{name} && . /etc/os-release && hostname"])
        assert said.split() == ["n2"]
        assert cluster.node("n2").enter(["ls", f"/etc/{name}"])
        run = ["srun", "--account=test", sys.executable, "-c", "import ssl, sqlite3, hpc_router; print('python')"]
        assert cluster.run(run, user=None, folder=ROOT).strip() == "python"
        run = ["srun", "--quiet", "--account=test", "id", "--user", "--name"]
        assert cluster.run(run, user=cluster.user).strip() == cluster.user
    assert not (there.folder / "etc" / name).exists()


@pytest.mark.parametrize(
    ("apt", "expected"),
    [
        ({}, {}),
        ({"Acquire::http::Proxy": "DIRECT"}, {}),
        ({"Acquire::http::Proxy": "http://proxy:3128/"}, {"http_proxy": "http://proxy:3128/"}),
        (
            {"Acquire::https::Proxy": "http://proxy:1", "Acquire::https::CAInfo": "/etc/ca.pem"},
            {"https_proxy": "http://proxy:1", "ca_certificate": "/etc/ca.pem"},
        ),
        ({"Acquire::https::Verify-Peer": "false"}, {"check_certificate": "off"}),
    ],
)
def test_wget_takes_the_way_that_apt_takes(apt: dict[str, str], expected: dict[str, str]) -> None:
    settings = releases.wget_settings(apt)
    assert {name: value for name, value in settings.items() if name not in ("timeout", "tries")} == expected


def test_an_unknown_release_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(releases.VARIABLE, "buzz")
    with pytest.raises(SlurmClusterError, match=r"TEST_SLURM_RELEASE=buzz: .*\(valid: newest, trixie, sid\)"):
        releases.chosen()
