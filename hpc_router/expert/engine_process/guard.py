"""The process between agent and engine. It ends the engine's whole process tree when the agent ends, for any reason.

It uses only the standard library and one thread, is started by the path of this file, and has a session of its own. Its
stdin is a pipe whose other end only the agent holds, so end of file means that the agent is dead. The engine dies with
the guard (PDEATHSIG). As child subreaper, the guard becomes the parent of processes that the engine leaves behind, even
of those in other sessions. It kills only its own descendants. It prints the engine's process id and ends with the
engine's exit status (as a shell: 128 + N for signal N, 127 if there is no program to run).
"""

import argparse
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
CANNOT_RUN = 127
KILL_PAUSE_S = 0.01
TRACKER_GRACE_S = 5.0
AGENT_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM, signal.SIGQUIT)
"""Signals that drain the agent, and that the engine and its descendants ignore."""
HANDLED_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, *AGENT_SIGNALS)
"""Signals that do not end the guard, because the agent decides when the engine ends. The guard acts on the first two
and ignores the others."""


def main() -> int:
    arguments = _arguments()
    wakeups = _wake_on_signals()
    become_subreaper()
    try:
        engine = start(arguments.argv)
    except OSError as error:
        sys.stderr.write(f"hpc-router: cannot run {arguments.argv[0]}: {error.strerror}\n")
        return CANNOT_RUN
    sys.stdout.write(f"{engine}\n")
    sys.stdout.flush()
    status = watch(engine, wakeups, grace_s=arguments.grace_s)
    kill_descendants()
    if status is None and arguments.folder is not None:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    return 128 + signal.SIGKILL if status is None else status


def start(argv: list[str]) -> int:
    """Starts the engine in its own process group, without stdin, with all output to the guard's stderr. Returns its
    process id.

    The engine and its descendants ignore AGENT_SIGNALS. Slurm sends one of them before the walltime ends; it is meant
    for the agent, but at some sites (proctrack/linuxproc) every process of the job gets it.
    """
    guard = os.getpid()

    def before_exec() -> None:
        for number in AGENT_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != guard:
            os._exit(CANNOT_RUN)

    process = subprocess.Popen(  # waited for in `_reap`, with all other descendants
        argv,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        preexec_fn=before_exec,  # safe, because this process has one thread
        process_group=0,
        restore_signals=True,
    )
    process.returncode = 0  # or its destructor would warn that the process is still running
    return process.pid


def watch(engine: int, wakeups: int, *, grace_s: float) -> int | None:
    """Waits until the engine has ended. Returns its exit status; None if the agent has died before that. When the guard
    gets SIGTERM, it sends SIGTERM to the engine, and SIGKILL `grace_s` seconds later. `wakeups`: a descriptor from
    which one byte can be read per signal that the guard gets."""
    kill_at = float("inf")
    while True:
        left_s = kill_at - time.monotonic()
        if left_s <= 0:
            kill_descendants()
            return 128 + signal.SIGKILL
        readable, _, _ = select.select([0, wakeups], [], [], None if left_s == float("inf") else left_s)
        if wakeups in readable:
            signals = os.read(wakeups, 64)
            if signal.SIGCHLD in signals and (status := _reap(engine)) is not None:
                return status
            if signal.SIGTERM in signals and kill_at == float("inf"):
                os.kill(engine, signal.SIGTERM)  # the engine was not reaped yet, so the number is still its own
                kill_at = time.monotonic() + grace_s
        if 0 in readable and not os.read(0, 64):
            return None


def _reap(engine: int) -> int | None:
    """Reaps every descendant that has ended. Returns the engine's exit status if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == engine:
            code = os.waitstatus_to_exitcode(status)
            found = 128 - code if code < 0 else code


def kill_descendants() -> None:
    """Sends SIGKILL to all descendants, and repeats this until none is left, because they may start new processes.

    Python's resource trackers get it last, after TRACKER_GRACE_S: once all other processes are gone, they remove shared
    memory and end by themselves.
    """
    trackers_until = time.monotonic() + TRACKER_GRACE_S
    while True:
        for pid in descendants(os.getpid()):
            if time.monotonic() < trackers_until and _may_be_tracker(pid):
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(KILL_PAUSE_S)


def _may_be_tracker(pid: int) -> bool:
    """Returns whether the process may be one of Python's resource trackers. This is also true while it has no command
    line, as at the start of a process."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return not command or b"multiprocessing.resource_tracker" in command


def descendants(root: int) -> list[int]:
    """Returns every living process below `root`, from the parents in /proc/*/stat."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found = list(children.get(root, ()))
    for pid in found:  # the list grows during the loop
        found.extend(children.get(pid, ()))
    return found


def _parent(process: Path) -> int | None:
    try:
        text = (process / "stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None  # the process has just ended


def _wake_on_signals() -> int:
    """Returns a descriptor that gets one byte per signal, so that `select` waits for signals as well."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in HANDLED_SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the engine would inherit
    return reading


def become_subreaper() -> None:
    """Makes this process the new parent of every descendant whose own parent ends, so that none escapes."""
    _prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))


def is_subreaper() -> bool:
    answer = ctypes.c_int()
    _prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(answer))
    return bool(answer.value)


def _prctl(option: int, argument: Any) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run an engine that ends with its agent.")
    parser.add_argument("--grace-s", type=float, default=10.0, help="from SIGTERM to SIGKILL")
    parser.add_argument("--folder", type=Path, help="removed when the agent has died")
    parser.add_argument("argv", nargs="+", help="the engine's command line, after --")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
