"""Two `apply` at the same time: the one whose change is lost says so."""

from pathlib import Path

import pytest

from hpc_router.cluster.commands import apply
from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.config import frozen
from hpc_router.config.compose import load_deployment
from hpc_router.errors import ConfigError
from hpc_router.state.atomic_files import replace_text
from hpc_router.state.run_directory import RunDir, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = make_run(tmp_path / "run")
    replace_text(run.config, frozen.to_yaml(load_deployment(["policy=model_field"])))
    return run


@pytest.mark.parametrize(
    ("owner", "step"), [(ControlLoop, "preview"), (apply, "want_config")], ids=["before the write", "after the write"]
)
def test_a_change_that_another_one_replaces_is_reported(
    run: RunDir, owner: object, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is written while this one asks Slurm, or while it writes its own."""
    change = apply.find_change(run, ["experts.math.engine.options.seed=1"], config_dir=None)
    other = frozen.to_yaml(load_deployment(["policy=model_field", "experts.code.engine.options.seed=2"]))
    original = getattr(owner, step)

    def meanwhile(*args: object, **options: object) -> object:
        result = original(*args, **options)
        replace_text(run.config, other)
        return result

    monkeypatch.setattr(owner, step, meanwhile)
    with pytest.raises(ConfigError, match="was changed meanwhile: look at it and apply again"):
        apply.write_change(change)
    assert run.config.read_text() == other
