"""What is built is what a clone is: the configs travel in the wheel, and the command line works far from any clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.needs import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content alone, in an empty folder."""
    dist, target = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_every_config_is_in_it(installed: Path) -> None:
    shipped = {p.relative_to(installed / "hpc_router/conf") for p in (installed / "hpc_router/conf").rglob("*.yaml")}
    assert shipped == {p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml")}
    assert shipped
    assert not (installed / "tests").exists()
    assert (installed / "analysis/report.py").exists()
    assert not (installed / "analysis/results").exists()


def test_the_sources_in_c_are_in_it(installed: Path) -> None:
    """They are compiled where they are first used."""
    native = Path("hpc_router/bench/load/native")
    shipped = {path.name for path in (installed / native).glob("*.[ch]")}
    assert shipped == {path.name for path in (ROOT / native).glob("*.[ch]")} == {"load.c", "engine.c", "loop.h"}


@pytest.mark.parametrize(
    "words", [["-m", "hpc_router.cli", "plan", "--json", "topology=sim"], ["-m", "launch.deploy", "--cfg", "job"]]
)
def test_it_plans_without_a_clone(installed: Path, tmp_path: Path, words: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    where = "import hpc_router; print(hpc_router.__file__)"
    found = subprocess.check_output([sys.executable, "-P", "-c", where], cwd=tmp_path, env=environment, text=True)
    assert found.startswith(str(installed)), "the wheel's package is the one under test"
    done = subprocess.run(
        [sys.executable, "-P", *words], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "generalist" in done.stdout
