"""The program of doctor's job on a node: `python -m hpc_router.cluster.doctor.node_job FOLDER`.

It writes its findings as JSON into the folder, and answers the files that `doctor` writes there. Outside of the folder
it changes nothing. It ends when the file `stop` exists, or after LIMIT_S.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

import hpc_router
from hpc_router.cluster.doctor.exchange import ROUNDS, ExchangeFolder, clock_server, own_address, read_clock, read_now
from hpc_router.cluster.launchers.commands import SlurmCommandError, run_slurm_command
from hpc_router.cluster.planning.prerequisites import CHECKS, CheckedHost, file_system, flock_error
from hpc_router.config import frozen
from hpc_router.state.atomic_files import create_text, replace_json

LIMIT_S: Final = 150.0
"""Maximum run time in seconds."""
EVERY_S: Final = 0.02
"""Interval between looks at the folder, in seconds."""
COMMAND_S: Final = 15.0
"""Time limit of a command, in seconds."""
CHILD_S: Final = 2.0
"""Time in seconds in which the child must receive the signal after this process has received it."""
_CHILD: Final = """
import os, signal, sys
def note(number, frame):
    open(sys.argv[1], "w").close()
signal.signal(signal.SIGUSR2, note)
os.write(1, b"ready")
sys.stdin.read()
"""


class SignalWatch:
    """Records whether SIGUSR2 reaches this process, and whether it reaches a child process that has a session of its
    own, as an engine has."""

    def __init__(self, exchange: ExchangeFolder) -> None:
        self._exchange = exchange
        self._at: float | None = None
        self._sign = exchange.folder / "child-signalled"
        signal.signal(signal.SIGUSR2, self._received)
        pipe = subprocess.PIPE
        argv = [sys.executable, "-c", _CHILD, str(self._sign)]
        self.child = subprocess.Popen(argv, stdin=pipe, stdout=pipe, start_new_session=True)
        assert self.child.stdout is not None
        self.child.stdout.read(len(b"ready"))
        self.done = False

    def _received(self, _number: int, _frame: FrameType | None) -> None:
        self._at = self._at or time.time()

    def look(self) -> None:
        """Writes the record of the signal once it has arrived and there was enough time for the child to receive it.
        Does nothing before that or if the record is written."""
        if self._at is not None and not self.done and time.time() > self._at + CHILD_S:
            self.done = True
            replace_json(self._exchange.signals, {"at": self._at, "descendants": self._sign.exists()})

    def close(self) -> None:
        """Kills the child."""
        self.child.kill()
        self.child.communicate()


def facts(exchange: ExchangeFolder, host: CheckedHost, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Returns the facts that only this node can find out, and the findings of the checks that run on every host."""
    login = read_now(exchange.login)
    return {
        "sees_login": login is not None,
        "reaches_login": None if login is None else _reaches(login),
        "creates_files": _creation_error(exchange),
        "flock": flock_error(exchange.folder),
        "file_system": file_system(exchange.folder),
        "squeue": _error_of(["squeue", "--me", "--noheader"]),
        "sbatch": _error_of(["sbatch", "--test-only"], stdin=exchange.script.read_text(encoding="utf-8")),
        "visible_gpus": environment.get("CUDA_VISIBLE_DEVICES"),
        "gpu_list": _gpu_list(),
        "checks": {name: [f.to_json() for f in check(host).findings] for name, check in CHECKS.items()},
    }


def _creation_error(exchange: ExchangeFolder) -> str | None:
    """Returns why files cannot be created safely in doctor's folder; None if they can. A file is created by a hard
    link, which must fail if the file exists."""
    try:
        first, second = create_text(exchange.created, "1"), create_text(exchange.created, "2")
    except OSError as error:
        return error.strerror or str(error)
    return None if first and not second else "a file that exists was created again"


def _reaches(login: Mapping[str, Any]) -> str | None:
    """Returns why this node cannot connect to the machine that runs `doctor`; None if it can. `login`: the address and
    port at which `doctor` listens."""
    try:
        read_clock(str(login["address"]), int(login["port"]))
    except OSError as error:
        return error.strerror or str(error)
    return None


def _error_of(argv: list[str], stdin: str = "") -> str | None:
    """Runs a Slurm command and returns its error; None if it succeeds."""
    try:
        run_slurm_command(argv, timeout_s=COMMAND_S, stdin=stdin)
    except SlurmCommandError as error:
        return str(error)
    return None


def _gpu_list() -> list[str] | None:
    """Returns the lines of `nvidia-smi -L`, which list GPUs and MIG instances; None if it cannot be run."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        return run_slurm_command(["nvidia-smi", "-L"], timeout_s=COMMAND_S).splitlines()
    except SlurmCommandError:
        return None


def serve(exchange: ExchangeFolder, watch: SignalWatch) -> None:
    """Answers the files that `doctor` writes and records SIGUSR2, until the file `stop` exists, for at most LIMIT_S."""
    number, until = 0, time.monotonic() + LIMIT_S
    while time.monotonic() < until and not exchange.stop.exists():
        if number < ROUNDS and read_now(exchange.ping(number)) is not None:
            replace_json(exchange.pong(number), {"at": time.time()})
            number += 1
        watch.look()
        time.sleep(EVERY_S)


def main(folder: Path) -> None:
    """Runs the job. `folder`: the exchange folder."""
    exchange = ExchangeFolder(folder)
    deployment = frozen.read(exchange.config)
    own, fabric_error = own_address(deployment.cluster.fabric)
    watch = SignalWatch(exchange)
    try:
        with clock_server(own) as port:
            started = {
                "at": time.time(),
                "host": socket.gethostname(),
                "address": own,
                "port": port,
                "fabric_error": fabric_error,
                "hpc_router": hpc_router.__version__,
                "python": sys.version.split()[0],
                "end_time": os.environ.get("SLURM_JOB_END_TIME"),
            }
            replace_json(exchange.started, started)
            host = CheckedHost(deployment, folder.parent, on_node=True)
            # The facts are collected in a thread: Slurm's commands may be slow, and would delay the answers to pings.
            threading.Thread(target=lambda: replace_json(exchange.node, facts(exchange, host)), daemon=True).start()
            serve(exchange, watch)
    finally:
        watch.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
