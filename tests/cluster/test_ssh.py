"""The `ssh` line from a laptop to the router, as text: nothing is connected."""

from pathlib import Path

import pytest

from hpc_router import frozen
from hpc_router.cluster import ssh
from hpc_router.cluster.ssh import Here, Tunnel, tunnel
from hpc_router.config import Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.registry import Kind, Record, State, publish
from hpc_router.rundir import RunDir

HERE = Here("ada", "login1.hpc.example", frozenset({"login1", "login1.hpc.example"}))


def to(
    url: str, *, node: str = "n17", login: str | None = None, run: str = "/home/ada/runs/a", port: int = 8000
) -> Tunnel:
    record = Record(Kind.ROUTER, "router-0.g1", url, State.READY, {}, node=node)
    return tunnel(record, login=login, here=HERE, port=port, run=Path(run))


@pytest.mark.parametrize(
    ("url", "node", "login", "line"),
    [
        # a router on a node that the login host reaches
        ("http://n17:41000", "n17", None, "ssh -N -L 8000:n17:41000 ada@login1.hpc.example"),
        ("http://10.1.0.17:41000", "n17", "hpc", "ssh -N -L 8000:10.1.0.17:41000 hpc"),
        ("http://n17:41000", "n17", "lovelace@hpc.example", "ssh -N -L 8000:n17:41000 lovelace@hpc.example"),
        ("http://[fd00::17]:41000", "n17", None, "ssh -N -L '8000:[fd00::17]:41000' ada@login1.hpc.example"),
        # on the loopback of the very host that one logs in to
        ("http://127.0.0.1:41000", "login1", None, "ssh -N -L 8000:127.0.0.1:41000 ada@login1.hpc.example"),
        ("http://127.0.0.1:41000", "login1", "a@login1", "ssh -N -L 8000:127.0.0.1:41000 a@login1"),
        ("http://[::1]:41000", "login1", None, "ssh -N -L '8000:[::1]:41000' ada@login1.hpc.example"),
        # on another host's loopback: through the login host; a login name may stand for several hosts
        ("http://127.0.0.1:41000", "n17", None, "ssh -N -J ada@login1.hpc.example -L 8000:127.0.0.1:41000 ada@n17"),
        ("http://localhost:41000", "login1", "hpc.example", "ssh -N -J hpc.example -L 8000:localhost:41000 ada@login1"),
        ("http://127.0.0.1:41000", "n17", "eve@hpc", "ssh -N -J eve@hpc -L 8000:127.0.0.1:41000 eve@n17"),
    ],
)  # fmt: skip
def test_the_line(url: str, node: str, login: str | None, line: str) -> None:
    assert to(url, node=node, login=login).line == line


def test_another_port_of_the_laptop() -> None:
    assert to("http://n17:41000", port=9000).argv[3] == "9000:n17:41000"
    assert "localhost:9000/v1" in "\n".join(to("http://n17:41000", port=9000).notes())


@pytest.mark.parametrize("port", [0, 65536])
def test_what_is_no_port(port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port {port}: valid are 1 to 65535"):
        to("http://n17:41000", port=port)


def test_the_notes_are_comments_and_survive_both_shells() -> None:
    """The laptop's shell takes one level of quotes, the login host's the other."""
    notes = to("http://n17:41000", login="hpc", run="/home/ada/my runs/a").notes()
    assert all(note.startswith("# ") for note in notes)
    assert """#   export OPENAI_API_KEY="$(ssh hpc 'cat '"'"'/home/ada/my runs/a/token'"'"'')\"""" in notes
    assert not any("cluster.login" in note for note in notes)
    assert any("cluster.login" in note for note in to("http://n17:41000").notes())


def test_of_a_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's record and the config's login host decide."""
    with pytest.raises(LaunchError, match="no router serves"):
        ssh.tunnel_to(run, port=8000)
    deployment = Deployment()
    deployment.cluster.login = "hpc"
    run.config.write_text(frozen.to_yaml(deployment))
    record = Record(Kind.ROUTER, "router-0.g1", "http://n17:41000", State.READY, {}, node="n17")
    publish(run.registry, record)
    monkeypatch.setattr(ssh, "live_router", lambda _run: record)
    assert ssh.tunnel_to(run, port=8000).line == "ssh -N -L 8000:n17:41000 hpc"
