"""Values of a batch script are single lines, and none sets an option that the script sets itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc_router.config.schema import ClusterConfig, ContainerConfig, JobOptions, ResourceConfig
from hpc_router.config.slurm_options import (
    SBATCH_OWNED,
    check_environment,
    check_options,
    check_run_path,
    check_script,
)
from hpc_router.errors import ConfigError


def refused(at: str = "cluster", **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_options(at, JobOptions(**options), warn_s=90)
    assert caught.value.key is not None
    assert str(caught.value).startswith(caught.value.key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_script(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_script(ClusterConfig(**values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_of_real_sites_are_valid() -> None:
    check_options(
        "cluster",
        JobOptions(
            partition="gpu,long",
            account="p42-x",
            qos="normal",
            constraint="[a100*2&ib]|(h100&!old)",
            reservation="course",
            exclude="n[1-3,7],login-2.example.org",
            walltime="1-00:00:00",
            exclusive=True,
            gpu_type="a100_3g.20gb",
            sbatch={"mail-type": "FAIL", "contiguous": True, "nice": 100, "comment": "for tests", "licenses": None},
            srun={"mpi": "none", "cpu-bind": "cores"},
        ),
        warn_s=90,
    )
    check_script(
        ClusterConfig(
            modules=["cuda/12.4", "python/3.11.5--gcc--12.3.0", "devel/cuda@12", "libstdc++/13"],
            setup=["source ~/env.sh", "\tif true; then ulimit -n 4096; fi"],
            env={"A_1": "two words 'and' \"quotes\" $(not run)", "_": ""},
            scratch="$SLURM_TMPDIR",
            container=ContainerConfig(image="x.sif", binds=["/a", "/a:/b", "/a:/b:ro"], options=["--nv"]),
        )
    )


@pytest.mark.parametrize("name", ["partition", "account", "qos", "constraint", "reservation", "exclude", "gpu_type"])
@pytest.mark.parametrize(
    "value", ["a b", "a\n#SBATCH --uid=0", "a'", 'a"', "a\\", "a#b", "`a`", "$(a)", "a;b", "", " "]
)
def test_a_word_of_sbatch_is_one_word(name: str, value: str) -> None:
    refused("experts.math.resources", **{name: value})


@pytest.mark.parametrize("value", ["soon", "", "1h", "-1", "12:00:00 "])
def test_a_walltime_has_slurms_form(value: str) -> None:
    assert "valid: D-HH:MM:SS, HH:MM:SS, MM:SS, or minutes" in refused(walltime=value)


@pytest.mark.parametrize("walltime", ["0", "00:01:30", "00:01:31", "00:02:29"])
def test_a_walltime_is_a_minute_longer_than_its_warning(walltime: str) -> None:
    """Slurm checks times once a minute, so a signal may come a minute early."""
    message = refused(walltime=walltime)
    assert message.startswith(f"cluster.walltime={walltime}: ")
    assert "cluster.warn_s=90" in message


@pytest.mark.parametrize("walltime", ["00:02:30", "3", "UNLIMITED"])
def test_a_minute_is_enough(walltime: str) -> None:
    check_options("cluster", JobOptions(walltime=walltime), warn_s=90)


def test_minutes_may_be_many() -> None:
    """YAML reads an unquoted `1:30` as a number; the error names its line."""
    check_options("cluster", JobOptions(walltime="43200"), warn_s=90)


@pytest.mark.parametrize(("name", "instead"), SBATCH_OWNED.items())
def test_an_option_that_is_set_elsewhere_names_the_key(name: str, instead: str) -> None:
    assert instead in refused("experts.math.resources", sbatch={name: "1"})


@pytest.mark.parametrize(
    ("short", "long"), [("part", "partition"), ("gre", "gres"), ("job-n", "job-name"), ("q", "qos")]
)
def test_a_short_form_of_such_an_option_is_refused(short: str, long: str) -> None:
    assert f"is short for --{long}" in refused(sbatch={short: "1"})


def test_a_dependency_can_be_combined_with_that_of_a_standby() -> None:
    """Slurm does not combine ',' (all) with '?' (any), and a standby router already has a dependency of its own."""
    for fine in ("singleton", "afterok:1:2,afterany:3", None):
        check_options("cluster", JobOptions(sbatch={"dependency": fine}), warn_s=90)
    message = refused(sbatch={"dependency": "afterok:1?afterok:2"})
    assert message.startswith("cluster.sbatch.dependency=afterok:1?afterok:2: ")
    message = refused(sbatch={"dependency": "afterok:1,Expand:2"})
    assert "'expand' gives the resources of this job to another one" in message
    for short in ("dep", "dependenc"):
        assert "is short for --dependency; write it out" in refused(sbatch={short: "singleton"})
    for value in (True, 17, ""):
        assert "cluster.sbatch.dependency" in refused(sbatch={"dependency": value})


def test_the_cluster_is_chosen_by_what_reaches_slurm() -> None:
    """Variables of Slurm's commands are not passed to them, except SLURM_CONF."""
    message = refused(sbatch={"clusters": "other"})
    assert "SLURM_CONF" in message
    assert "SLURM_CLUSTERS" not in message


@pytest.mark.parametrize("path", ["/runs/100%", "/runs/%j/mine", "/a\\b/mine", "/a\nb"])
@pytest.mark.parametrize("kind", ["slurm", "allocation"])
def test_a_run_directory_is_no_pattern_of_file_names(path: str, kind: str) -> None:
    with pytest.raises(ConfigError, match="run directory") as caught:
        check_run_path(Path(path), kind)
    assert "\n" not in str(caught.value)
    assert "valid: " in str(caught.value)
    check_run_path(Path(path), "local")


@pytest.mark.parametrize("kind", ["slurm", "allocation", "local"])
def test_other_run_directories_are_fine(kind: str) -> None:
    check_run_path(Path('/runs/it\'s "my" run, $HOME #1 ü'), kind)


@pytest.mark.parametrize(
    "options",
    [{"--mail-type": "x"}, {"mail type": "x"}, {"": 1}, {"MAIL": 1}, {"a=b": 1}, {"-": 1}, {"a\nb": 1}, {"a-": 1}],
)
def test_an_option_looks_like_one(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="valid: a long option without its dashes"):
        check_options("cluster", JobOptions(srun=options), warn_s=90)


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x00", "it's", "a\\", 1.5, ["a"], {"a": 1}, "a\u2028b"])
def test_a_value_is_plain(value: Any) -> None:
    refused(sbatch={"comment": value})


@pytest.mark.parametrize("module", ["", "cuda 12", "cuda;ls", "$(x)", "-x", "a\nb", "a'b", "a&b", "../x"])
def test_a_module_is_a_name(module: str) -> None:
    assert "cluster.modules[1]=" in refused_script(modules=["cuda/12.4", module])


def test_a_line_break_is_refused() -> None:
    assert "cluster.setup[1]: has the control character '\\n'; give each line as an entry" in refused_script(
        setup=["true", "one\ntwo"]
    )
    assert "cluster.setup[0] is empty" in refused_script(setup=[" "])
    assert "cluster.env.A" in refused_script(env={"A": "one\ntwo"})
    for name in ("python", "scratch", "login"):
        assert f"cluster.{name}" in refused_script(**{name: "a\nb"})
        assert f"cluster.{name} is empty" in refused_script(**{name: ""})


@pytest.mark.parametrize("name", ["1A", "A-B", "", "A B", "A=B", "Ä"])
def test_a_variable_has_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a variable"):
        check_environment("experts.math.engine.env", {name: "x"})


@pytest.mark.parametrize(
    ("container", "message"),
    [
        (ContainerConfig(program=""), "cluster.container.program is empty"),
        (ContainerConfig(image=""), "cluster.container.image is empty"),
        (ContainerConfig(options=["--nv", ""]), "cluster.container.options[1] is empty"),
        (ContainerConfig(binds=["a:b:c"]), "cluster.container.binds[0]=a:b:c: not a mount (valid: SOURCE"),
        (ContainerConfig(binds=["/a", ":b"]), "cluster.container.binds[1]=:b"),
        (ContainerConfig(binds=["a:b:ro:x"]), "cluster.container.binds[0]"),
    ],
)
def test_a_container_is_whole(container: ContainerConfig, message: str) -> None:
    assert message in refused_script(container=container)


def test_an_expert_has_the_same_options() -> None:
    check_options("experts.math.resources", replace(ResourceConfig(), partition="big"), warn_s=0)
