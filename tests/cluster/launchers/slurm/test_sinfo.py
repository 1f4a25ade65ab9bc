"""Parses the `sinfo` output of very different sites."""

import math
import os
import stat
from pathlib import Path

import pytest

from hpc_router.cluster.launchers.slurm import sinfo
from hpc_router.cluster.launchers.slurm.sinfo import FORMAT, NodeKind, ask_site, parse_gres, parse_site
from hpc_router.errors import LaunchError

MIXED = """\
gpu|gpu*|up|1-00:00:00|2|64|512000|idle|a100,ib,zen3|gpu:a100:4(S:0-1)
gpu|gpu*|up|1-00:00:00|1|64|1024000|drain|h100,ib|gpu:h100:8(S:0-7)
gpu|gpu*|up|1-00:00:00|1|32|256000|mix-|(null)|gpu:v100:2(S:0),gpu:a100_1g.5gb:7(S:1),nvme:1
cpu|cpu|up|infinite|30|128|1|alloc|(null)|(null)
closed|closed|down|2:00:00|4|16|64000|down*|old|(null)
empty|empty|up|30:00|0|0|0|n/a||
sinfo: warning, not a line of ours
"""


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("(null)", {}),
        ("", {}),
        ("gpu:4", {"": 4}),
        ("gpu", {"": 1}),
        ("gpu:a100:4", {"a100": 4}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:4(S:0,2-3),gpu:v100:2(S:1)", {"a100": 4, "v100": 2}),
        ("gpu:a100:2(S:0),gpu:a100:2(S:1)", {"a100": 4}),
        ("nvme:1.5T,gpu:2(IDX:0-1),shard:16", {"": 2}),
        ("gpu:no_consume:4", {"": 4}),
        ("gpu:h100:no_consume:4", {"h100": 4}),
        ("gpu:1g.5gb:7", {"1g.5gb": 7}),
        ("gpu:a100", {"a100": 1}),
        ("mps:400,gpumem:80G", {}),
    ],
)
def test_gres(text: str, gpus: dict[str, int]) -> None:
    assert parse_gres(text) == gpus


def test_a_partition_of_different_nodes() -> None:
    found = parse_site(MIXED)
    assert list(found.partitions) == ["gpu", "cpu", "closed", "empty"]
    assert found.default == "gpu"
    gpu = found.partitions["gpu"]
    assert gpu.limit_s == 86400
    assert [kind.nodes for kind in gpu.kinds] == [2, 1, 1]
    assert [kind.gpus_of(None) for kind in gpu.kinds] == [4, 8, 9]
    assert [kind.gpus_of("a100") for kind in gpu.kinds] == [4, 0, 0]
    assert [kind.usable for kind in gpu.kinds] == [True, False, True]
    assert gpu.kinds[0].features == {"a100", "ib", "zen3"}
    assert gpu.kinds[2].features == frozenset()


def test_what_a_site_leaves_out() -> None:
    """A site without time limits, memory and nodes."""
    found = parse_site(MIXED).partitions
    assert found["cpu"].limit_s == math.inf
    assert found["cpu"].kinds[0].memory_mb is None
    assert found["closed"].state == "down"
    assert not found["closed"].kinds[0].usable
    assert found["empty"].kinds == ()
    assert found["empty"].limit_s == 1800
    assert parse_site("").default is None


@pytest.mark.parametrize("state", ["idle", "idle~", "mix#", "alloc", "plnd", "pow_dn", "maint"])
def test_nodes_that_run_jobs_now_or_by_themselves(state: str) -> None:
    assert kind_in(state).usable


@pytest.mark.parametrize("state", ["idle*", "down", "drng", "drain*", "inval", "down~"])
def test_nodes_that_need_an_administrator(state: str) -> None:
    assert not kind_in(state).usable


def kind_in(state: str) -> NodeKind:
    return parse_site(f"p|p*|up|1:00|1|8|1000|{state}|(null)|(null)").partitions["p"].kinds[0]


def program(folder: Path, name: str, script: str) -> Path:
    """Puts a command of Slurm on the PATH that runs this script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_one_sinfo_without_the_users_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "sinfo", f'echo "$SINFO_PARTITION$SINFO_FORMAT$*" >>{tmp_path}/asked; echo "$LINES_OF"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SINFO_PARTITION", "other")
    monkeypatch.setenv("SINFO_FORMAT", "%P")
    monkeypatch.setenv("LINES_OF", MIXED)
    assert ask_site() == parse_site(MIXED)
    assert (tmp_path / "asked").read_text() == f"--all --noheader --exact --format={FORMAT}\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo one >&2; echo 'Unable to contact slurm controller' >&2; exit 1", "^Unable to contact slurm controller$"),
        ("exit 1", "non-zero exit status 1"),
        ("echo retrying >&2; exec sleep 60", r"no answer within 2 s: retrying$"),
        ("echo out; printf 're\\377try\\n' >&2; exec sleep 60", "no answer within 2 s: re\ufffdtry$"),
        ("echo out; exec sleep 60", r"no answer within 2 s$"),
        ("printf '\\377\\n' >&2; exit 1", "^\ufffd$"),
    ],
)
def test_no_answer(script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "sinfo", script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sinfo, "TIMEOUT_S", 2.0)
    with pytest.raises(LaunchError, match=message):
        ask_site()


def test_an_answer_in_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a feature that is not valid UTF-8 does not hide the rest."""
    program(tmp_path, "sinfo", "printf 'p|p*|up|1:00|1|8|1000|idle|\\377,fast|(null)\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "fast" in ask_site().partitions["p"].kinds[0].features


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sinfo is not installed here"):
        ask_site()
