"""The run directory of an `up`: an interrupt leaves no incomplete one."""

from pathlib import Path

import pytest

from hpc_router.cluster.planning import run_target
from hpc_router.cluster.planning.run_target import RunTarget
from hpc_router.config.schema import Deployment


def interrupted(*_: object, **__: object) -> bool:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "named"), [("create_text", True), ("create_text", False), ("point_latest", False)])
def test_an_interrupt_while_the_run_directory_is_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, named: bool
) -> None:
    """A second Ctrl-C may arrive at any moment."""
    monkeypatch.setattr(run_target, step, interrupted)
    runs = tmp_path / "runs"
    target = RunTarget(Deployment(runs=str(runs)), tmp_path / "mine" if named else None)
    with pytest.raises(KeyboardInterrupt):
        target.open()
    assert not (tmp_path / "mine").exists()
    assert list(runs.glob("*")) == []


def test_a_run_that_exists_survives_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = RunTarget(Deployment(), tmp_path / "mine")
    target.open()
    monkeypatch.setattr(run_target, "create_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        target.open()
    assert (tmp_path / "mine" / "config.yaml").exists()
