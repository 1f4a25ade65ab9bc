"""The supervisor: the router's first process, which keeps one control process and N workers running.

It holds the address, forks its children, restarts those that died, and ends with all of them. It has one thread and no
event loop, reads and writes no files, and handles no requests, so that no request can make it fail. The children are
forked from it to share the memory of everything that is loaded; none outlives it (PDEATHSIG). It creates the socket
pairs that connect the control process and the workers, and passes their ends on.
"""

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

from hpc_router import backoff
from hpc_router.errors import LaunchError
from hpc_router.net.job_environment import END_SIGNALS, WARNING_SIGNALS
from hpc_router.router.ipc import messages
from hpc_router.router.ipc.shared_counters import CUT_OFF, IN_FLIGHT, Counters
from hpc_router.router.ipc.supervisor_commands import send_command

CONTROL: Final = "control"
STABLE_S: Final = 10.0
"""Minimum lifetime in seconds of a child that counts as healthy: its next end is the first in a row."""
FIRST_PAUSE_S: Final = 0.1
"""First pause in seconds before a restart; each further pause is twice as long."""
MAX_PAUSE_S: Final = 10.0
"""Maximum pause in seconds before a restart."""
MAX_LISTEN_S: Final = 1.0
"""Maximum pause in seconds before the restart of a worker for which its socket stays open, so that new clients wait for
its successor.

Before a longer pause the socket is closed, which resets those clients, and the kernel gives all new connections to the
other workers.
"""
MAX_FAILURES_IN_A_ROW: Final = 8
"""The router gives up when every process of one kind has ended this many times in a row."""
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, *WARNING_SIGNALS, *END_SIGNALS)
_PR_SET_PDEATHSIG: Final = 1


def worker_name(worker: int) -> str:
    return f"worker {worker}"


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """The arguments of a child process. `worker`: its number; None for the control process.

    `commands`: the socket for commands from the supervisor. `channels`: sockets by number of a worker; for the control
    process those to the running workers, for a worker the one to the control process, under its own number.
    `processes`: the status of all children. `notices`: texts for the log that no control process has received yet.
    """

    worker: int | None
    commands: socket.socket
    channels: Mapping[int, socket.socket]
    listener: socket.socket | None
    processes: Mapping[str, messages.ProcessStatus]
    notices: tuple[str, ...]


@dataclass(slots=True)
class Child:
    """The supervisor's state of one child. `worker`: its number; None for the control process. `pid`: 0 if the child is
    not running; it is then started at `due_at`. `in_a_row`: number of its early ends in a row; after a run of at least
    `STABLE_S` seconds, the count starts again at 1."""

    name: str
    worker: int | None
    listener: socket.socket | None = None
    pid: int = 0
    commands: socket.socket | None = None
    started_at: float = 0.0
    due_at: float = 0.0
    in_a_row: int = 0
    restarts: int = 0
    last_end: str | None = None

    def died(self, why: str, now: float) -> None:
        """Records the end of the process, with the reason `why`, and sets the time of its restart: at once for the
        first end in a row, then after pauses that double."""
        self.in_a_row = 1 if now - self.started_at >= STABLE_S else self.in_a_row + 1
        self.due_at = now + pause_s(self.in_a_row)
        self.pid, self.last_end = 0, why
        if self.listener is not None and self.due_at > now + MAX_LISTEN_S:
            self.listener.close()
            self.listener = None

    def status(self) -> messages.ProcessStatus:
        """Returns the status that is reported to the control process."""
        return messages.ProcessStatus(self.restarts, self.last_end, self.pid or None)


def pause_s(in_a_row: int) -> float:
    """Returns the pause in seconds before the restart of a child that has ended `in_a_row` times in a row."""
    return 0.0 if in_a_row <= 1 else backoff.pause_s(in_a_row - 1, first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S)


@dataclass(slots=True)
class RouterSupervisor:
    """Starts the router's child processes, restarts those that end, and stops all of them after a stop signal.

    `control`, `worker`: the functions that the children run. `listen`: makes a worker's socket. `stop_s`: seconds from
    the signal until the remaining children are killed. `cut`: number of requests that the workers had not finished when
    they ended.
    """

    control: Callable[[ChildSpec], None]
    worker: Callable[[ChildSpec], None]
    listen: Callable[[], socket.socket]
    counters: Counters
    stop_s: float
    clock: Callable[[], float] = time.monotonic
    children: list[Child] = field(init=False)
    cut: int = 0
    _stopping_until: float | None = None
    _wakeups: tuple[int, int] = (-1, -1)
    _undelivered: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Runs until all children have ended after a stop signal. Raises LaunchError if its children end again and
        again."""
        self._wakeups = reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        handled = (signal.SIGCHLD, signal.SIGHUP, *STOP_SIGNALS)
        handlers = {number: signal.signal(number, lambda *_: None) for number in handled}
        gc.collect()
        gc.freeze()
        workers = range(self.counters.workers)
        self.children = [Child(CONTROL, None), *(Child(worker_name(worker), worker) for worker in workers)]
        try:
            self._watch()
        finally:
            for child in self._living():
                os.kill(child.pid, signal.SIGKILL)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            os.close(writing)
            os.close(reading)

    def _watch(self) -> None:
        while True:
            now = self.clock()
            if self._stopping_until is None:
                for child in self.children:
                    if not child.pid and child.due_at <= now:
                        self._start(child)
            elif not self._living():
                return
            elif now >= self._stopping_until:
                for child in self._living():
                    os.kill(child.pid, signal.SIGKILL)
            self._wait()
            self._reap()

    def _wait(self) -> None:
        """Waits until a signal arrives or a child is due to start, and handles stop signals and SIGHUP."""
        now = self.clock()
        due = [child.due_at for child in self.children if not child.pid and self._stopping_until is None]
        if self._stopping_until is not None:
            due.append(max(self._stopping_until, now + 0.1))
        timeout = max(0.0, min(due) - now) if due else None
        if not select.select([self._wakeups[0]], [], [], timeout)[0]:
            return
        signals = os.read(self._wakeups[0], 256)
        if any(number in signals for number in STOP_SIGNALS) and self._stopping_until is None:
            self._stopping_until = self.clock() + self.stop_s  # `now` was read before the wait
            for child in self._living():
                self._send(child, messages.DrainCommand())
            for child in self.children:
                if child.listener is not None:
                    child.listener.close()  # the worker closes its own copy once it has drained
        if signal.SIGHUP in signals:
            self._send(self.children[0], messages.ReloadCommand())

    def _reap(self) -> None:
        for child in self._living():
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                child.died(_describe(code), self.clock())
                if child.commands is not None:
                    child.commands.close()
                if child.worker is not None:
                    if self._stopping_until is not None:
                        cells = self.counters.row(child.worker)
                        self.cut += max(cells[CUT_OFF], cells[IN_FLIGHT])  # IN_FLIGHT if the worker was killed
                    self.counters.clear(child.worker)
                if self._stopping_until is None:
                    self._check_failures(child)
                    self._report_processes(f"{child.name} (process {pid}) {child.last_end}")
        if self._stopping_until is not None and not any(c.worker is not None for c in self._living()):
            self._send(self.children[0], messages.EndCommand())

    def _check_failures(self, child: Child) -> None:
        """Raises LaunchError if this child, and every other child of its kind (control process or worker), has ended at
        least `MAX_FAILURES_IN_A_ROW` times in a row."""
        kind = [c for c in self.children if (c.worker is None) == (child.worker is None)]
        if all(c.in_a_row >= MAX_FAILURES_IN_A_ROW for c in kind):
            raise LaunchError(
                f"{child.name} {child.last_end}, {child.in_a_row} times in a row; the router's log says why"
            )

    def _start(self, child: Child) -> None:
        if child.worker is not None and child.listener is None:
            child.listener = self.listen()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        others = [c for c in self._living() if c.worker is not None] if child.worker is None else self.children[:1]
        pairs = {peer.name: socket.socketpair() for peer in others if peer.pid}
        if child.last_end is not None:
            child.restarts += 1
        channels = {}
        for peer in others:
            worker = peer.worker if child.worker is None else child.worker
            if worker is not None and peer.name in pairs:
                channels[worker] = pairs[peer.name][0]
        spec = ChildSpec(child.worker, theirs, channels, child.listener, self._statuses(), tuple(self._undelivered))
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor = os.getpid()
        pid = os.fork()
        if not pid:
            keep = {theirs.fileno(), *(channel.fileno() for channel in channels.values())}
            if child.listener is not None:
                keep.add(child.listener.fileno())
            _enter_child(supervisor, close=self._descriptors(ours, (b for _, b in pairs.values())) - keep)
            _run_child(self.control if child.worker is None else self.worker, spec)
        child.pid, child.commands, child.started_at = pid, ours, self.clock()
        theirs.close()
        if child.worker is None:
            self._undelivered.clear()
        for peer in others:
            if peer.name in pairs:
                near, far = pairs[peer.name]
                self._send(peer, messages.AttachCommand(child.worker), far)
                near.close()
                far.close()
        self._report_processes(None)

    def _descriptors(self, ours: socket.socket, more: Iterable[socket.socket]) -> set[int]:
        """Returns the descriptors of the supervisor that a new child must close: those of the supervisor itself, of its
        other children, of `ours` (the supervisor's end of the new command socket), and of `more`. A copy in the child
        would keep a connection open after its owner has ended."""
        descriptors = {*self._wakeups, ours.fileno(), *(sock.fileno() for sock in more)}
        for child in self.children:
            descriptors |= {s.fileno() for s in (child.listener, child.commands) if s is not None and s.fileno() >= 0}
        return descriptors

    def _statuses(self) -> dict[str, messages.ProcessStatus]:
        return {child.name: child.status() for child in self.children}

    def _report_processes(self, notice: str | None) -> None:
        """Sends the status of all processes to the control process, and `notice` for its log. A notice is kept for the
        next control process if none is running."""
        if notice is not None and not self.children[0].pid:
            self._undelivered.append(notice)
        self._send(self.children[0], messages.ProcessesChanged(self._statuses(), notice))

    def _send(self, child: Child, command: messages.Message, channel: socket.socket | None = None) -> None:
        """Sends a command to a child. If the child has ended or does not read, the command is lost; a restarted child
        gets the current state at its start."""
        if child.pid and child.commands is not None:
            with contextlib.suppress(OSError):
                send_command(child.commands, command, channel)

    def _living(self) -> list[Child]:
        return [child for child in self.children if child.pid]


def _enter_child(supervisor: int, *, close: set[int]) -> None:
    """Prepares a process that was just forked from the process `supervisor`: lets it die with the supervisor, ignores
    signals because it gets commands instead, and closes the descriptors in `close`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (signal.SIGHUP, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    for descriptor in close:
        os.close(descriptor)


def _run_child(body: Callable[[ChildSpec], None], spec: ChildSpec) -> NoReturn:
    status = 1
    try:
        body(spec)
        status = 0
    except BaseException:  # noqa: BLE001  # no exception may reach the supervisor's own frames
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _describe(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
