"""`up` and `down` as a user runs them, with real agents and simulated engines: repeated, interrupted, refused and
failing."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e

TOPOLOGY = """# @package _global_
defaults:
  - override /policy: model_field
  - _self_
experts:
  a: {model: m, engine: {kind: sim}}
  b: {model: m, engine: {kind: sim}}
policy: {fallback: a}
cluster: {reconcile_s: 0.3, beat_s: 0.5}
"""
BROKEN = "experts.{}.engine.options.faults=[{{kind: load_fail, reason: weights}}]"
SLOW = "experts.{}.engine.options.load_s=1000"


@dataclass
class Place:
    """A working folder with a small topology of the user."""

    folder: Path
    scratch: Path

    def words(self, verb: str, *arguments: str) -> list[str]:
        extra = ["--config-dir", "conf", "topology=small", f"cluster.scratch={self.scratch}"] if verb == "up" else []
        return [sys.executable, "-m", "hpc_router.cli", verb, *extra, *arguments]

    def run(self, verb: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.words(verb, *arguments), cwd=self.folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, verb: str, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.words(verb, *arguments),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def runs(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "runs").glob("*") if p.name != "latest")

    def jobs(self, run: str) -> list[str]:
        return sorted(p.name for p in (self.folder / run / "jobs").glob("*"))

    def processes(self) -> list[int]:
        return with_word(str(self.folder)) + with_word(str(self.scratch))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    topology = tmp_path / "conf" / "topology" / "small.yaml"
    topology.parent.mkdir(parents=True)
    topology.write_text(TOPOLOGY)
    scratch = Path(tempfile.mkdtemp(prefix="hpcr-", dir="/tmp"))
    place = Place(tmp_path, scratch)
    yield place
    for run in {*tmp_path.glob("runs/*"), tmp_path / "run"}:
        if (run / "registry").is_dir():
            place.run("down", "--run", str(run))
    eventually_sync(lambda: not place.processes())
    shutil.rmtree(scratch)


def test_up_again_and_down_again(place: Place) -> None:
    first = place.run("up", "--wait", "all")
    assert "serving at http://127.0.0.1:" in first.stdout
    run = f"runs/{place.runs[0]}"
    jobs = place.jobs(run)
    assert jobs == ["a-0.g1", "b-0.g1", "router-0.g1"]
    again = place.run("up")
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    assert place.jobs(run) == jobs
    assert len(place.runs) == 1
    refused = place.run("up", "--run", run, "experts.a.replicas=3", code=2)
    assert "frozen and differs in experts.a.replicas" in refused.stderr
    place.run("up", "--run", run)
    status = json.loads(place.run("status", "--json").stdout)
    assert {name: e["ready"] for name, e in status["experts"].items()} == {"a": 1, "b": 1}
    assert "[a, " in place.run("chat", "hello").stderr
    assert json.loads(place.run("route", "hello", "--json").stdout)["expert"] == "a"
    assert place.run("url").stdout.strip() == status["router"]["url"]
    assert "a-0.g1 |" in place.run("logs", "a").stdout
    assert json.loads(place.run("why", "--json").stdout) == []
    assert "3 jobs ended" in place.run("down").stdout
    assert "nothing ran" in place.run("down").stdout
    assert not place.processes()
    stopped = json.loads(place.run("status", "--json").stdout)
    assert stopped["down"]
    assert stopped["router"]["url"] is None
    place.run("up", "--wait", "all")  # the same run again, with new generations
    assert place.jobs(run) == sorted([*jobs, "a-0.g2", "b-0.g2", "router-0.g2"])
    assert len(place.runs) == 1


def test_two_up_at_once_make_one_run(place: Place) -> None:
    both = [place.start("up", "--wait", "all") for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0].splitlines()[0] == said[1][0].splitlines()[0]
    assert len(place.runs) == 1
    assert place.jobs(f"runs/{place.runs[0]}") == ["a-0.g1", "b-0.g1", "router-0.g1"]
    assert sorted(p.name for p in (place.folder / "runs").iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_leaves_no_process_and_no_run(place: Place, number: signal.Signals) -> None:
    up = place.start("up", SLOW.format("a"), SLOW.format("b"))
    assert up.stderr is not None
    while "loading" not in (line := up.stderr.readline()):
        assert line, "up ended"
    os.killpg(up.pid, number)
    _, said = up.communicate(timeout=60)
    assert up.returncode == 130, said
    assert "interrupted" in said
    assert not place.processes()
    assert not (place.folder / "runs").exists()
    assert [p for p in place.scratch.rglob("*") if not p.is_dir()] == []


@contextmanager
def frozen_agent(place: Place, run: str, replica: str) -> Iterator[None]:
    """Stops the replica's agent by SIGSTOP during the block, so that it cannot end."""
    path = place.folder / run / "jobs" / replica / "process.json"
    eventually_sync(path.exists)
    pid = json.loads(path.read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def until_asked_to_end(place: Place, run: str, replica: str) -> None:
    path = place.folder / run / "jobs" / replica / "stop.json"
    eventually_sync(lambda: path.exists() and json.loads(path.read_text())["cancel_at"] is not None)


def until_ended(place: Place, run: str, *replicas: str) -> None:
    eventually_sync(lambda: all((place.folder / run / "jobs" / name / "exit.json").exists() for name in replicas))


def command_in(said: str) -> list[str]:
    """The words of the command that a message names, without `hpc-router`."""
    named = re.search("`hpc-router ([^`]+)`", said)
    assert named is not None, said
    return shlex.split(named[1])


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_names_what_is_left_and_the_command_that_ends_it(place: Place, second: signal.Signals) -> None:
    up = place.start("up", SLOW.format("a"), SLOW.format("b"))
    eventually_sync(lambda: place.runs and len(place.jobs(run := f"runs/{place.runs[0]}")) == 3 and run)
    run = f"runs/{place.runs[0]}"
    with frozen_agent(place, run, "b-0.g1"):
        os.killpg(up.pid, signal.SIGINT)
        until_asked_to_end(place, run, "b-0.g1")
        until_ended(place, run, "a-0.g1", "router-0.g1")
        os.killpg(up.pid, second)
        _, said = up.communicate(timeout=60)
    assert up.returncode == 130, said
    last = said.splitlines()[-1]
    assert last.startswith("hpc-router: interrupted; ")
    assert "; b-0.g1 may still run" in last
    assert command_in(last) == ["down", "--run", str(place.folder / run)]
    place.run(*command_in(last))
    assert not place.processes()


def test_a_second_ctrl_c_removes_a_run_directory_without_jobs(place: Place) -> None:
    """The second Ctrl-C comes while the classifier is trained, or just before the first submission."""
    program = (
        "import os, sys, pathlib\n"
        "from hpc_router.cluster.commands import up\n"
        "def train(run, deployment):\n"
        "    pathlib.Path('training').touch()\n"
        "    while True: os.read(0, 1)\n"
        "up.train_classifier = train\n"
        "from hpc_router.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", program, *place.words("up")[3:]]
    up = subprocess.Popen(
        words, cwd=place.folder, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    eventually_sync((place.folder / "training").exists)
    assert len(place.runs) == 1
    os.killpg(up.pid, signal.SIGINT)
    eventually_sync(lambda: _pending_signals(up.pid) == 0)
    os.killpg(up.pid, signal.SIGINT)
    _, said = up.communicate(timeout=60)
    assert up.returncode == 130, said
    assert "what this `up` started has been ended" in said
    assert not (place.folder / "runs").exists()


def _pending_signals(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd")))


def test_an_interrupted_down_names_what_is_left(place: Place) -> None:
    place.run("up", "--wait", "all")
    run = f"runs/{place.runs[0]}"
    with frozen_agent(place, run, "a-0.g1"):
        down = place.start("down")
        until_asked_to_end(place, run, "a-0.g1")
        until_ended(place, run, "b-0.g1", "router-0.g1")
        os.killpg(down.pid, signal.SIGINT)
        _, said = down.communicate(timeout=60)
    assert down.returncode == 130, said
    assert "interrupted; a-0.g1 may still run" in said.splitlines()[-1]
    place.run(*command_in(said.splitlines()[-1]))
    assert not place.processes()


def test_an_interrupted_drain_names_what_still_drains(place: Place) -> None:
    place.run("up", "--wait", "all")
    run = f"runs/{place.runs[0]}"
    with frozen_agent(place, run, "a-0.g1"):
        drain = place.start("drain", "a", "--wait")
        assert drain.stdout is not None
        assert "a-0.g1 drains: its job got SIGTERM" in drain.stdout.readline()
        os.killpg(drain.pid, signal.SIGINT)
        _, said = drain.communicate(timeout=60)
    assert drain.returncode == 130, said
    assert "interrupted; a-0.g1" in said.splitlines()[-1]


def test_ctrl_c_in_a_terminal(place: Place) -> None:
    """The key is pressed while the live table is shown. A run that existed before stays unchanged."""
    place.run("register", "--run", "run", "--expert", "big", "--url", "http://127.0.0.1:1", "--model", "m")
    leader, follower = pty.openpty()
    up = subprocess.Popen(
        [*place.words("up", "--run", "run", SLOW.format("a"), "--wait", "all")],
        cwd=place.folder,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        preexec_fn=_take_terminal,
    )
    os.close(follower)
    screen = b""
    while b"ready" not in screen:
        screen += os.read(leader, 4096)
    os.write(leader, b"\x03")
    while True:
        try:
            screen += os.read(leader, 4096)
        except OSError:  # the last process of the terminal has ended
            break
    os.close(leader)
    assert up.wait(60) == 130, screen.decode()
    assert not place.processes()
    assert sorted(p.name for p in (place.folder / "run" / "registry").iterdir()) == ["big-x0.g1.json"]


def _take_terminal() -> None:
    """Starts a session whose terminal is stdin."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_deployment_that_cannot_serve_is_taken_down(place: Place) -> None:
    done = place.run("up", BROKEN.format("a"), BROKEN.format("b"), code=1)
    assert "nothing can serve" in done.stderr
    assert "a-0.g1: weights: RuntimeError" in done.stderr
    assert not place.processes()
    causes = {c["replica"]: c for c in json.loads(place.run("why", "--json").stdout)}
    assert causes["a-0.g1"]["reason"] == "weights"
    assert any("model weights" in line for line in causes["a-0.g1"]["log"])
    assert "complete the model's files" in causes["a-0.g1"]["advice"]


def test_a_failing_expert_is_reported_and_the_others_serve(place: Place) -> None:
    done = place.run("up", "--wait", "all", BROKEN.format("b"), code=1)
    assert "serving at" in done.stdout
    assert "b-0.g1 failed; the others serve" in done.stderr
    status = json.loads(place.run("status", "--json").stdout)
    assert [r["state"] for r in status["experts"]["b"]["replicas"]] == ["failed"]
    assert status["experts"]["a"]["ready"] == 1
    assert "Cannot find any model weights" in place.run("why", "b").stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experts.a.engine.kind=vlm", "'vllm'?"),
        ("experts.a.engine.python=/no/python", "experts.a.engine.python=/no/python: not an executable"),
        ("experts.b.engine.options.extra.nope=1", "experts.b.engine.options: the engine refuses: "),
        ("experts.b.engine.options.extra.capacity=0", "experts.b.engine.options: the engine refuses: error: capacity"),
        ("policy.fallback=c", "no expert is named 'c'"),
    ],
)
def test_a_refused_config_makes_nothing(place: Place, override: str, said: str) -> None:
    assert said in place.run("up", override, code=2).stderr
    assert sorted(p.name for p in place.folder.iterdir()) == ["conf"]


def test_another_config_is_another_run(place: Place) -> None:
    """If the second `up` is interrupted, `latest` names the first run again."""
    place.run("up")
    latest = (place.folder / "runs" / "latest").readlink()
    up = place.start("up", SLOW.format("a"), SLOW.format("b"))
    eventually_sync(lambda: len(place.runs) == 2 and (place.folder / "runs" / "latest").readlink() != latest)
    os.killpg(up.pid, signal.SIGINT)
    up.communicate(timeout=60)
    assert up.returncode == 130
    assert (place.folder / "runs" / "latest").readlink() == latest
    assert len(place.runs) == 1
    assert json.loads(place.run("status", "--json").stdout)["router"]["answers"]


def test_scale(place: Place) -> None:
    place.run("up", "--wait", "all")
    assert place.run("scale", "a=2", "b=0").stdout.split() == ["a=2", "b=0"]

    def ready() -> dict[str, int]:
        status = json.loads(place.run("status", "--json").stdout)
        return {name: len(e["replicas"]) and e["ready"] for name, e in status["experts"].items()}

    eventually_sync(lambda: ready() == {"a": 2, "b": 0})
    assert "no expert is named 'c'" in place.run("scale", "c=1", code=2).stderr
    assert "not EXPERT=N" in place.run("scale", "a=x", code=2).stderr


def test_a_router_and_an_expert_by_hand(place: Place) -> None:
    """`launch.router` and `launch.expert` join one run without `up`; each drains on Ctrl-C."""
    overrides = ["--config-dir", "conf", "topology=small", f"cluster.scratch={place.scratch}"]

    def launch(name: str, *words: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", f"launch.{name}", "run=run", *words, *overrides]
        return subprocess.Popen(command, cwd=place.folder, stderr=subprocess.DEVNULL, start_new_session=True)

    both = [launch("router"), launch("expert", "name=a", "experts.a.engine.options.ttft_ms=1")]
    try:
        eventually_sync(lambda: "a-h0.g1" in _ready(place))
        assert "[a, named, a-h0.g1]" in place.run("chat", "--run", "run", "--model", "a", "hello").stderr
    finally:
        for process in reversed(both):
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    assert list((place.folder / "run" / "registry").iterdir()) == []


def _ready(place: Place) -> list[str]:
    """The replicas that the router has found ready."""
    if not (place.folder / "run" / "registry").is_dir():
        return []
    status = json.loads(place.run("status", "--run", "run", "--json").stdout)
    found = [r["replica"] for e in status["experts"].values() for r in e["replicas"] if r["state"] == "ready"]
    return found if status["router"]["answers"] else []
