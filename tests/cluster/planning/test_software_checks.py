"""Checks of modules, loaded as a batch job loads them, and of the container's image."""

import shutil
import subprocess
from pathlib import Path

import pytest

from hpc_router.cluster.planning import software_checks
from hpc_router.cluster.planning.software_checks import CHECK, is_address, software_faults
from hpc_router.config.schema import ClusterConfig, ContainerConfig
from tests.cluster.programs import Programs
from tests.support.needs import need


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment whose `module` command knows two modules; the second needs the first."""
    need(Path("/etc/profile.d/modules.sh").exists(), "environment-modules")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "12.4").write_text("#%Module\nsetenv CUDA_HOME /cuda\n")
    (tmp_path / "nccl").write_text("#%Module\nprereq cuda\nputs stderr {no error here}\n")
    for name in ("MODULESHOME", "LOADEDMODULES", "_LMFILES_", "BASH_FUNC_module%%"):
        monkeypatch.delenv(name, raising=False)
    return {"MODULEPATH": str(tmp_path), "MODULES_AUTO_HANDLING": "0"}


def test_modules_that_load_have_no_faults(modules: dict[str, str]) -> None:
    cluster = ClusterConfig(kind="slurm", modules=["cuda/12.4", "nccl"], env=modules)
    assert software_faults(cluster) == ([], [])


@pytest.mark.parametrize(
    ("names", "at"), [(["nope"], "[0]=nope"), (["cuda/12.4", "nope/1"], "[1]=nope/1"), (["nccl"], "[0]=nccl")]
)
def test_a_module_that_does_not_load_is_a_fault(names: list[str], at: str, modules: dict[str, str]) -> None:
    ((fault,), warnings) = software_faults(ClusterConfig(kind="slurm", modules=names, env=modules))
    assert fault.startswith(f"cluster.modules{at}: does not load: ")
    assert "module avail" in fault
    assert "\n" not in fault
    assert warnings == []


def test_a_shell_that_has_a_module_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `module` command that reports errors as Lmod does, and one that always ends with status 0."""
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("module", "[ $2 = good ] || echo 'Lmod has detected the following error: no such thing' >&2")
    assert software_faults(ClusterConfig(kind="slurm", modules=["good"])) == ([], [])
    ((fault,), _) = software_faults(ClusterConfig(kind="slurm", modules=["good", "bad"]))
    assert "cluster.modules[1]=bad: does not load: Lmod has detected the following error: no such thing" in fault
    assert programs.calls("module") == ["load good", "load good", "load bad"]


def test_no_module_command_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a `module` command, the check script says so by its exit status."""
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("bash", "exit 3")
    assert software_faults(ClusterConfig(kind="slurm", modules=["a"])) == (
        [],
        ["cluster.modules: could not be checked: this machine has no `module` command"],
    )


def test_the_scripts_are_shipped() -> None:
    assert CHECK.exists()
    assert CHECK.with_name("modules.sh").exists()


def test_shellcheck_finds_no_fault() -> None:
    need(shutil.which("shellcheck") is not None, "shellcheck")
    scripts = [str(CHECK), str(CHECK.with_name("modules.sh"))]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("image", "address"),
    [("docker://a/b:1", True), ("oras://x/y", True), ("docker-archive:x.tar", True), ("x.sif", False), ("/a/b", False)],
)
def test_addresses_of_images(image: str, address: bool) -> None:
    assert is_address(image) is address


def test_a_missing_image_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Programs(tmp_path / "bin", monkeypatch).add("apptainer", "")
    absent = ContainerConfig(image=str(tmp_path / "no.sif"))
    assert software_faults(ClusterConfig(kind="slurm", container=absent))[0] == [
        f"cluster.container.image={tmp_path}/no.sif: no such file "
        "(valid: a .sif file, a folder, or an address such as docker://...)"
    ]
    for image in (str(tmp_path), "docker://a/b"):
        assert software_faults(ClusterConfig(kind="slurm", container=ContainerConfig(image=image))) == ([], [])
    offline = ClusterConfig(
        kind="slurm", container=ContainerConfig(image="docker://a/b", program="no-program"), offline=True
    )
    _, (program, fetched) = software_faults(offline)
    assert program == "cluster.container.program=no-program: not found here; the nodes must have it"
    assert "nodes are offline" in fetched


def test_on_this_machine_the_program_has_to_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program must be on the PATH that the engine gets. No module is loaded on cluster=local."""
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("module", "exit 1")
    cluster = ClusterConfig(container=ContainerConfig(image=str(tmp_path), program="no-program"), modules=["a"])
    ((fault,), warnings) = software_faults(cluster)
    assert fault.startswith("cluster.container.program=no-program: not on the PATH here")
    assert warnings == []
    assert programs.calls("module") == []
    (tmp_path / "no-program").write_text("#!/bin/sh\n")
    (tmp_path / "no-program").chmod(0o755)
    cluster.env = {"PATH": str(tmp_path)}
    assert software_faults(cluster) == ([], [])


def test_a_module_that_hangs_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Programs(tmp_path / "bin", monkeypatch).add("bash", "echo out; printf '\\377 err' >&2; exec sleep 60")
    monkeypatch.setattr(software_checks, "TIMEOUT_S", 0.3)
    faults, (warning,) = software_faults(ClusterConfig(kind="slurm", modules=["a"]))
    assert faults == []
    assert warning == "cluster.modules: could not be checked: no answer within 0.3 s"
