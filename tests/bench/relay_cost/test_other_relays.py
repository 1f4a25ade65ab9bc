"""The configuration of other relays, and the messages for relays that are not installed."""

import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from hpc_router.bench.relay_cost import interface
from hpc_router.bench.relay_cost.interface import find
from hpc_router.bench.relay_cost.options import RelayCostOptions
from hpc_router.bench.relay_cost.other_relays import haproxy_cfg, nginx_conf, other_relays, package_argv
from hpc_router.bench.relay_cost.run import measure_relay_cost
from hpc_router.bench.relay_cost.this_router import RouterAndAgent, agent_argv, router_argv, this_router
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.state.run_directory import make_run
from tests.support.needs import need


def test_nginx_has_one_worker_and_keeps_its_connections(tmp_path: Path) -> None:
    text = nginx_conf(tmp_path, port=1234, engine=5678, user="somebody")
    for line in (
        "worker_processes 1;",
        "listen 127.0.0.1:1234 ",
        "server 127.0.0.1:5678; keepalive ",
        'proxy_set_header Connection "";',
        "proxy_http_version 1.1;",
        "proxy_buffering off;",
        "access_log off;",
    ):
        assert line in text
    assert text.count("0.0.0.0") == 0


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    program = find("nginx", None)
    need(program is not None, "nginx")
    conf = tmp_path / "nginx.conf"
    conf.write_text(nginx_conf(tmp_path, port=1, engine=2, user="root"))
    done = subprocess.run(
        [str(program), "-t", "-c", str(conf), "-p", str(tmp_path), "-e", str(tmp_path / "log")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_haproxy_has_one_thread() -> None:
    text = haproxy_cfg(port=1234, engine=5678)
    for line in (
        "  nbthread 1\n",
        "  bind 127.0.0.1:1234 ",
        "  server engine 127.0.0.1:5678 ",
        "  option abortonclose\n",
    ):
        assert line in text


def test_haproxy_accepts_its_configuration(tmp_path: Path) -> None:
    program = find("haproxy", None)
    need(program is not None, "haproxy")
    conf = tmp_path / "haproxy.cfg"
    conf.write_text(haproxy_cfg(port=1, engine=2))
    done = subprocess.run([str(program), "-c", "-f", str(conf)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_packages_get_one_worker_on_loopback() -> None:
    words = package_argv("/bin/sglang-router", ("launch",), port=1234, engine=5678)
    assert words[:2] == ["/bin/sglang-router", "launch"]
    pairs = dict(zip(words[2::2], words[3::2], strict=True))
    assert pairs["--host"] == pairs["--prometheus-host"] == "127.0.0.1"
    assert (pairs["--port"], pairs["--worker-urls"]) == ("1234", "http://127.0.0.1:5678")
    assert pairs["--policy"] == "round_robin"


def test_no_secret_on_a_command_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for words in (router_argv(run), agent_argv(run, tmp_path / "engine")):
        assert not any(run.token() in word or run.secret() in word for word in words)


def test_a_missing_relay_is_named_with_its_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(interface, "SERVER_PATH", str(tmp_path))
    absent = {one.name: one.absent() for one in (*other_relays(tmp_path), *this_router())}
    assert {name for name, why in absent.items() if why is None} == {
        "direct",
        "router",
        "router-user",
        "router-2-workers",
        "router+agent",
    }
    assert all("not installed (" in why for why in absent.values() if why)
    with pytest.raises(LaunchError, match="none of the chosen relays is installed"):
        measure_relay_cost(RelayCostOptions(only=("nginx", "haproxy"), out=tmp_path / "out"), Console(stderr=True))
    stderr = capsys.readouterr().err
    assert "nginx: not installed" in stderr
    assert "apt-get install haproxy" in stderr


def test_the_virtual_environment_comes_before_path(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "vllm-router"
    program.parent.mkdir()
    program.touch()
    assert find("vllm-router", tmp_path) == program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": 4001}, "--streams 4001: between 1 and 4000"),
        ({"streams": 0}, "--streams 0"),
        ({"connections": 4001}, "--connections 4001"),
        ({"rate": 0.0}, "--rate 0"),
        ({"rate": float("nan")}, "--rate nan"),
        ({"seconds": 601.0}, "--seconds 601"),
        ({"rounds": 0}, "--rounds 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        RelayCostOptions(out=tmp_path, **options).checked()  # type: ignore[arg-type]


def test_the_limits_are_valid(tmp_path: Path) -> None:
    RelayCostOptions(out=tmp_path, streams=4000, connections=4000, rate=1000, seconds=600, rounds=100).checked()


def test_the_agent_is_a_second_hop() -> None:
    assert RouterAndAgent().hops == 2
