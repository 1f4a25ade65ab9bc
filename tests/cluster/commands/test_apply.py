"""What `apply` says and keeps: of another `apply` at the same time, and of the values that `set` has set."""

import json
import threading
from pathlib import Path

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.commands import apply
from hpc_router.cluster.commands import set as set_
from hpc_router.cluster.control_loop.loop import ControlLoop, LoopPass
from hpc_router.config import frozen
from hpc_router.config.compose import load_deployment
from hpc_router.config.revision import revisions
from hpc_router.errors import ConfigError
from hpc_router.router.settings import settings_in
from hpc_router.state.atomic_files import replace_text
from hpc_router.state.run_directory import RunDir, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = make_run(tmp_path / "run")
    replace_text(run.config, frozen.to_yaml(load_deployment(["policy=model_field"])))
    return run


@pytest.mark.parametrize(
    ("owner", "step"),
    [(ControlLoop, "preview"), (apply, "train_classifier")],
    ids=["before the write", "after the write"],
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


def test_of_two_changes_at_the_same_time_one_is_written(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both were found in the same config, and both processes are past their first look at it."""
    options = ("experts.math.engine.options.seed=1", "experts.code.engine.options.seed=2")
    changes = [apply.find_change(run, [option], config_dir=None) for option in options]
    both_checked, results = threading.Barrier(2), list[str]()
    original = ControlLoop.preview

    def preview(control: ControlLoop, **options: bool) -> LoopPass:
        both_checked.wait()
        return original(control, **options)

    monkeypatch.setattr(ControlLoop, "preview", preview)

    def write(change: apply.Change) -> None:
        try:
            apply.write_change(change)
            results.append("written")
        except ConfigError as error:
            results.append(str(error))

    threads = [threading.Thread(target=write, args=(change,)) for change in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written, refused = sorted(results, key=len)
    assert written == "written"
    assert "was changed meanwhile" in refused
    assert frozen.read(run.config) in [change.after for change in changes]


def test_a_rollout_ends_when_another_change_replaces_the_config(run: RunDir) -> None:
    """It would submit jobs with its own values, and say at the end that every job has them."""
    control = apply.write_change(apply.find_change(run, ["experts.math.engine.options.seed=1"], config_dir=None))
    apply.write_change(apply.find_change(run, ["experts.code.engine.options.seed=2"], config_dir=None))
    with pytest.raises(ConfigError, match="was changed meanwhile"):
        apply.roll_out(control, print)
    assert list(run.jobs.iterdir()) == []


def test_an_apply_that_is_interrupted_between_its_writes_changes_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs that the loop submits then have the revision that it wants; otherwise it would replace them for ever."""
    before = run.config.read_text()
    change = apply.find_change(run, ["experts.math.engine.options.seed=1"], config_dir=None)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(apply, "replace_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            apply.write_change(change)
    assert run.config.read_text() == before
    assert ControlLoop(run).preview().desired.revisions == {}
    apply.write_change(apply.find_change(run, ["experts.math.engine.options.seed=1"], config_dir=None))
    assert ControlLoop(run).preview().desired.revisions == revisions(change.after)


def test_a_loop_with_an_earlier_config_takes_no_job_for_outdated(run: RunDir) -> None:
    """It would end the jobs of the new config."""
    control = ControlLoop(run)
    apply.write_change(apply.find_change(run, ["experts.math.engine.options.seed=1"], config_dir=None))
    assert control.preview().desired.revisions == {}


def test_a_setting_ends_when_the_config_changes_its_key(run: RunDir) -> None:
    set_.change(run, {"router.queue_timeout_s": "59", "router.ping_s": "9"}, [])
    change = apply.find_change(run, ["router.queue_timeout_s=5"], config_dir=None)
    assert "router.queue_timeout_s: the setting 59.0 of `hpc-router set` ends" in change.lines()
    apply.write_change(change)
    assert settings_in(run.read_desired()) == {"router.ping_s": 9.0}


def test_values_that_the_config_has_already_are_refused_with_the_setting_that_hides_them(run: RunDir) -> None:
    set_.change(run, {"router.queue_timeout_s": "59"}, [])
    with pytest.raises(
        ConfigError, match=r"router\.queue_timeout_s is set to 59\.0 at .*`hpc-router set router\.queue"
    ):
        apply.find_change(run, ["router.queue_timeout_s=30"], config_dir=None)


def test_a_config_that_a_setting_does_not_fit_is_refused(run: RunDir) -> None:
    """The router would use none of the settings, and `set` would refuse each further one."""
    set_.change(run, {"policy.fallback": "math"}, [])
    with pytest.raises(
        ConfigError, match=r"the setting policy\.fallback=math does not fit .*`hpc-router set policy\.f"
    ):
        apply.find_change(run, ["~experts.math"], config_dir=None)


def test_the_config_of_a_run_that_is_down_is_for_the_next_up(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_desired({"down": True})
    assert main(["apply", "--run", str(run.path), "experts.math.engine.options.seed=1"]) == 0
    assert f"no job runs: `hpc-router up --run {run.path}` starts them with this config" in capsys.readouterr().out
    assert frozen.read(run.config).experts["math"].engine.options["seed"] == 1
    assert main(["apply", "--json", "--run", str(run.path), "experts.math.engine.options.seed=2"]) == 0
    change, told = map(json.loads, capsys.readouterr().out.splitlines())
    assert (change["event"], change["replaced"]) == ("change", ["math"])
    assert "no job runs" in told["text"]
