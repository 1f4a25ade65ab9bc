"""The `ssh` command that reaches the router from a laptop, as text: nothing is connected."""

import asyncio
import getpass
import json
import socket
from pathlib import Path

import pytest

from hpc_router.cli.main import main
from hpc_router.client.router_identity import IdentityCheck
from hpc_router.cluster.commands import router_access
from hpc_router.cluster.commands.tunnel import LocalHost, Tunnel, tunnel
from hpc_router.config import frozen
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError
from hpc_router.net.auth import new_token
from hpc_router.state.registry import Record, RecordKind, State
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import NONCE, a_deployment, a_router, a_run

HERE = LocalHost("ada", "login1.hpc.example", frozenset({"login1", "login1.hpc.example"}))


def to(
    url: str, *, node: str = "n17", login: str | None = None, run: str = "/home/ada/runs/a", port: int = 8000
) -> Tunnel:
    record = Record(RecordKind.ROUTER, "router-0.g1", url, State.READY, {}, node=node)
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
def test_invalid_ports(port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port {port}: not a port"):
        to("http://n17:41000", port=port)


def test_the_notes_are_comments_and_survive_both_shells() -> None:
    """The laptop's shell removes one level of quotes, the login host's shell another."""
    notes = to("http://n17:41000", login="hpc", run="/home/ada/my runs/a").notes()
    assert all(note.startswith("# ") for note in notes)
    assert """#   export OPENAI_API_KEY="$(ssh hpc 'cat '"'"'/home/ada/my runs/a/token'"'"'')\"""" in notes
    assert not any("cluster.login" in note for note in notes)
    assert any("cluster.login" in note for note in to("http://n17:41000").notes())


def configured(tmp_path: Path, *, login: str = "hpc") -> RunDir:
    run = a_run(tmp_path)
    deployment = Deployment()
    deployment.cluster.login = login
    run.config.write_text(frozen.to_yaml(deployment))
    return run


def leads(monkeypatch: pytest.MonkeyPatch, url: str, *, node: str = socket.gethostname(), nonce: str = NONCE) -> None:
    record = Record(RecordKind.ROUTER, "router-0.g1", url, State.READY, {}, nonce=nonce, node=node)
    monkeypatch.setattr(router_access, "live_router", lambda _run: record)


async def output_of(capsys: pytest.CaptureFixture[str], run: RunDir, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = await asyncio.to_thread(main, ["url", "--run", str(run.path), *words])
    return status, *capsys.readouterr()


async def test_the_tunnel_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The router's record and the config's login host determine the command; the router has proven its identity."""
    run = configured(tmp_path, login=socket.gethostname())
    async with a_router(run, a_deployment("math")) as router:
        leads(monkeypatch, router.url)
        line = f"ssh -N -L 8000:{router.url.removeprefix('http://')} {socket.gethostname()}"
        status, out, err = await output_of(capsys, run, "--ssh")
        assert (status, out) == (0, f"{line}\n")
        assert "could not be proven" not in err
        status, out, _ = await output_of(capsys, run, "--json")
        assert (status, json.loads(out)) == (0, {"url": router.url, "ssh": line.split(), "proven": True})
        assert await output_of(capsys, run) == (0, f"{router.url}\n", "")


@pytest.mark.parametrize("words", [(), ("--ssh",), ("--json",), ("--json", "--ssh")])
async def test_an_unproven_router_is_not_printed(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = configured(tmp_path)
    status, out, err = await output_of(capsys, run, *words)
    assert (status, out) == (1, "")
    assert "no router serves" in err
    async with a_router(run, a_deployment("math")) as router:
        leads(monkeypatch, router.url, nonce=new_token())
        status, out, err = await output_of(capsys, run, *words)
    assert (status, out) == (1, "")
    assert "something else answers there" in err


def test_on_the_loopback_of_another_node_the_identity_is_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is printed with a note, because no other process leads there. The bare address is refused: it is of
    no use here."""
    run = configured(tmp_path)
    leads(monkeypatch, "http://127.0.0.1:41000", node="n17")
    monkeypatch.setattr(router_access, "check_identity", lambda *_: pytest.fail("checked a process on this node"))
    assert main(["url", "--run", str(run.path), "--ssh"]) == 0
    out, err = capsys.readouterr()
    assert out == f"ssh -N -J hpc -L 8000:127.0.0.1:41000 {getpass.getuser()}@n17\n"
    assert all(line.startswith("# ") for line in err.splitlines())
    assert "# the router listens on the loopback of n17" in err
    assert "could not be proven" in err
    assert main(["url", "--run", str(run.path), "--ssh", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proven"] is False
    for words in ([], ["--json"]):
        monkeypatch.setattr(router_access, "check_identity", lambda *_: IdentityCheck.UNREACHABLE)
        assert main(["url", "--run", str(run.path), *words]) == 1
        assert capsys.readouterr().out == ""
