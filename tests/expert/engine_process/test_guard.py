"""The guard ends the engine's whole process tree when the agent ends, and no other process. Uses real processes.

Every process of the tree has one FIFO open for writing, so the FIFO's end of file shows that all of them have ended.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpc_router.expert.engine_process.guard import descendants
from hpc_router.expert.engine_process.process import GUARD
from tests.support.waiting import GUARD_S

TREE = """
import os, signal, sys
fifo = os.open(sys.argv[1], os.O_WRONLY)
reading, writing = os.pipe()
if "alone" not in sys.argv:
    if os.fork() == 0:
        os.setsid()
        os.fork()
        os.write(fifo, b"x")
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1), os.read(reading, 1)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else signal.SIG_DFL)
os.write(fifo, b"x")
if "exit" in sys.argv:
    sys.exit(7)
signal.pause()
"""


SHARED_MEMORY = """
import os, signal, sys
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
sys.stderr.write(memory.name + "\\n")
sys.stderr.flush()
signal.pause()
"""


@dataclass
class Guarded:
    guard: subprocess.Popen[bytes]
    fifo: int

    def started(self, processes: int = 3) -> int:
        """Waits until the whole tree runs. Returns the engine's process id."""
        marks = 0
        while marks < processes:
            data = self._read()
            assert data, "the tree ended too early"
            marks += len(data)
        assert self.guard.stdout is not None
        return int(self.guard.stdout.readline())

    def all_gone(self) -> bool:
        return self._read() == b""

    def _read(self) -> bytes:
        assert select.select([self.fifo], [], [], GUARD_S)[0], "the tree lives on"
        return os.read(self.fifo, 64)


@contextmanager
def guarded(*arguments: str, at: Path, grace_s: float = GUARD_S, folder: Path | None = None) -> Iterator[Guarded]:
    path = at / "fifo"
    os.mkfifo(path)
    fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    options = ["--grace-s", str(grace_s)] + (["--folder", str(folder)] if folder else [])
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", str(GUARD), *options, "--", sys.executable, "-c", TREE, str(path), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with guard:  # leaving the block closes the guard's stdin, which ends everything
        yield Guarded(guard, fifo)
    os.close(fifo)


def test_the_end_of_the_agent_ends_the_process_tree_and_removes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "engine.sock").touch()
    with guarded("deaf", at=tmp_path, folder=folder) as tree:
        tree.started()
        assert tree.guard.stdin is not None
        tree.guard.stdin.close()
        assert tree.all_gone()
        assert tree.guard.wait(GUARD_S) == 128 + signal.SIGKILL
        assert not folder.exists()


def test_the_end_of_the_engine_ends_the_processes_that_it_started(tmp_path: Path) -> None:
    with guarded("exit", at=tmp_path, folder=tmp_path) as tree:
        tree.started()
        assert tree.guard.wait(GUARD_S) == 7
        assert tree.all_gone()
        assert tmp_path.exists()


def test_sigterm_reaches_the_engine(tmp_path: Path) -> None:
    with guarded(at=tmp_path) as tree:
        tree.started()
        tree.guard.terminate()
        assert tree.guard.wait(GUARD_S) == 128 + signal.SIGTERM
        assert tree.all_gone()


def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    with guarded("deaf", at=tmp_path, grace_s=0.05) as tree:
        tree.started()
        tree.guard.terminate()
        assert tree.guard.wait(GUARD_S) == 128 + signal.SIGKILL
        assert tree.all_gone()


def test_a_killed_engine_is_reported_as_such(tmp_path: Path) -> None:
    with guarded(at=tmp_path) as tree:
        os.kill(tree.started(), signal.SIGKILL)
        assert tree.guard.wait(GUARD_S) == 128 + signal.SIGKILL
        assert tree.all_gone()


def test_a_killed_guard_ends_the_engine(tmp_path: Path) -> None:
    with guarded("alone", at=tmp_path) as tree:
        tree.started(1)
        tree.guard.kill()
        assert tree.all_gone()


OF_THE_AGENT = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM, signal.SIGQUIT]


@pytest.mark.parametrize("number", [signal.SIGINT, *OF_THE_AGENT])
def test_other_signals_end_neither_guard_nor_engine(number: signal.Signals, tmp_path: Path) -> None:
    with guarded(at=tmp_path) as tree:
        tree.started()
        tree.guard.send_signal(number)
        tree.guard.terminate()
        assert tree.guard.wait(GUARD_S) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", OF_THE_AGENT)
def test_the_whole_tree_ignores_the_signals_that_drain_the_agent(number: signal.Signals, tmp_path: Path) -> None:
    """At some sites Slurm sends the signals of a job to every process of it."""
    with guarded(at=tmp_path) as tree:
        engine = tree.started()
        for pid in [engine, *descendants(engine)]:
            os.kill(pid, number)  # has the lower number, so it would end them before SIGTERM does
        tree.guard.terminate()
        assert tree.guard.wait(GUARD_S) == 128 + signal.SIGTERM


def test_shared_memory_of_a_killed_engine_is_removed() -> None:
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", str(GUARD), "--", sys.executable, "-c", SHARED_MEMORY],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    with guard:
        assert guard.stderr is not None
        memory = Path("/dev/shm") / guard.stderr.readline().decode().strip()
        assert memory.exists()
        assert guard.stdin is not None
        guard.stdin.close()
        assert guard.wait(GUARD_S) == 128 + signal.SIGKILL
    assert not memory.exists()


def test_no_program() -> None:
    guard = subprocess.run(
        [sys.executable, "-I", "-S", str(GUARD), "--", "/no/such/python", "-m", "x"], capture_output=True, check=False
    )
    assert guard.returncode == 127
    assert guard.stdout == b""
    assert b"cannot run /no/such/python: No such file or directory" in guard.stderr
