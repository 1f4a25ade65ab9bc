"""The process that the router is to everybody else: it keeps one control process and N workers running.

It holds the address, forks its children, starts again what has died, and ends with all of them. It has one thread and
no event loop, reads and writes no files, and knows nothing of requests: what runs in it cannot fail by what they do.
Children are forked rather than begun anew, so that they share the memory of everything that is loaded. None outlives
it (PDEATHSIG). Control process and workers talk over pairs of sockets that it makes and hands out.
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
from typing import Any, Final, NoReturn

from hpc_router import backoff
from hpc_router.errors import LaunchError
from hpc_router.router.ipc import supervisor_commands
from hpc_router.router.ipc.shared_counters import CUT, IN_FLIGHT, Counters

CONTROL: Final = "control"
STABLE_S: Final = 10.0
"""A child that lived for so long begins with a clean record."""
FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 10.0
HELD_S: Final = 1.0
"""New clients of a dead worker wait so long for the next one; else they are reset, and the kernel deals out no more."""
MAX_ENDS_IN_A_ROW: Final = 8
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_PR_SET_PDEATHSIG: Final = 1


def worker_name(worker: int) -> str:
    return f"worker {worker}"


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What a child gets: `orders`, and its ways to the others, by worker; a worker has one, to the control process.

    `processes` and `news`: what the control process has missed.
    """

    worker: int | None
    orders: socket.socket
    ways: Mapping[int, socket.socket]
    listener: socket.socket | None
    processes: Mapping[str, Mapping[str, Any]]
    news: tuple[str, ...]


@dataclass(slots=True)
class Child:
    """`worker` None: the control process. `pid` 0: it does not run; then it is due at `due_at`."""

    name: str
    worker: int | None
    listener: socket.socket | None = None
    pid: int = 0
    orders: socket.socket | None = None
    begun_at: float = 0.0
    due_at: float = 0.0
    in_a_row: int = 0
    restarts: int = 0
    last_end: str | None = None

    def died(self, why: str, now: float) -> None:
        """The first time in a while it is started again at once, then after longer and longer pauses."""
        self.in_a_row = 1 if now - self.begun_at >= STABLE_S else self.in_a_row + 1
        self.due_at = now + pause_s(self.in_a_row)
        self.pid, self.last_end = 0, why
        if self.listener is not None and self.due_at > now + HELD_S:
            self.listener.close()
            self.listener = None

    def told(self) -> dict[str, Any]:
        return {"restarts": self.restarts, "last_end": self.last_end, "pid": self.pid or None}


def pause_s(in_a_row: int) -> float:
    """Before a child is started again that has ended so often in a row."""
    return 0.0 if in_a_row <= 1 else backoff.pause_s(in_a_row - 1, first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S)


@dataclass(slots=True)
class RouterSupervisor:
    """`run` returns when it was told to stop and all children have ended; what is left after `stop_s` is killed.
    `cut`: requests that the workers had not finished when they ended.
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
    _unheard: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Raises LaunchError when its children cannot be kept alive."""
        self._wakeups = reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        noticed = (signal.SIGCHLD, signal.SIGHUP, *STOP_SIGNALS)
        handlers = {number: signal.signal(number, lambda *_: None) for number in noticed}
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
        """For a signal, or until something is due."""
        now = self.clock()
        due = [child.due_at for child in self.children if not child.pid and self._stopping_until is None]
        if self._stopping_until is not None:
            due.append(max(self._stopping_until, now + 0.1))
        timeout = max(0.0, min(due) - now) if due else None
        if not select.select([self._wakeups[0]], [], [], timeout)[0]:
            return
        signals = os.read(self._wakeups[0], 256)
        if any(number in signals for number in STOP_SIGNALS) and self._stopping_until is None:
            self._stopping_until = self.clock() + self.stop_s  # `now` is as old as the router was quiet
            self._tell_all({"do": "drain"})
            for child in self.children:
                if child.listener is not None:
                    child.listener.close()  # the worker's own goes when it has drained
        if signal.SIGHUP in signals:
            self._tell(self.children[0], {"do": "reload"})

    def _reap(self) -> None:
        for child in self._living():
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                child.died(_words(code), self.clock())
                if child.orders is not None:
                    child.orders.close()
                if child.worker is not None:
                    if self._stopping_until is not None:
                        cells = self.counters.row(child.worker)
                        self.cut += max(cells[CUT], cells[IN_FLIGHT])  # the latter of one that was killed
                    self.counters.clear(child.worker)
                if self._stopping_until is None:
                    self._give_up_on(child)
                    self._tell_news(f"{child.name} (process {pid}) {child.last_end}")
        if self._stopping_until is not None and not any(c.worker is not None for c in self._living()):
            self._tell(self.children[0], {"do": "end"})

    def _give_up_on(self, child: Child) -> None:
        """Others may still serve: only when none of its kind stays alive."""
        kind = [c for c in self.children if (c.worker is None) == (child.worker is None)]
        if all(c.in_a_row >= MAX_ENDS_IN_A_ROW for c in kind):
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
        number = [c.worker if child.worker is None else child.worker for c in others]
        ways = {n: pairs[p.name][0] for n, p in zip(number, others, strict=True) if n is not None and p.name in pairs}
        birth = ChildSpec(child.worker, theirs, ways, child.listener, self._told(), tuple(self._unheard))
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor = os.getpid()
        pid = os.fork()
        if not pid:
            keep = {theirs.fileno(), *(way.fileno() for way in ways.values())}
            if child.listener is not None:
                keep.add(child.listener.fileno())
            _begin(supervisor, others=self._descriptors(ours, (b for _, b in pairs.values())) - keep)
            _end(self.control if child.worker is None else self.worker, birth)
        child.pid, child.orders, child.begun_at = pid, ours, self.clock()
        theirs.close()
        if child.worker is None:
            self._unheard.clear()
        for peer in others:
            if peer.name in pairs:
                way, back = pairs[peer.name]
                self._tell(peer, {"do": "attach", "worker": child.worker}, back)
                way.close()
                back.close()
        self._tell_news(None)

    def _descriptors(self, ours: socket.socket, more: Iterable[socket.socket]) -> set[int]:
        """What a child must not keep open, or nobody would notice the end of another."""
        found = {*self._wakeups, ours.fileno(), *(sock.fileno() for sock in more)}
        for child in self.children:
            found |= {s.fileno() for s in (child.listener, child.orders) if s is not None and s.fileno() >= 0}
        return found

    def _told(self) -> dict[str, dict[str, Any]]:
        return {child.name: child.told() for child in self.children}

    def _tell_news(self, news: str | None) -> None:
        if news is not None and not self.children[0].pid:
            self._unheard.append(news)
        self._tell(self.children[0], {"do": "note", "processes": self._told(), "news": news})

    def _tell_all(self, order: Mapping[str, Any]) -> None:
        for child in self._living():
            self._tell(child, order)

    def _tell(self, child: Child, order: Mapping[str, Any], way: socket.socket | None = None) -> None:
        """A child that has just died, or reads nothing, is not told: its successor is."""
        if child.pid and child.orders is not None:
            with contextlib.suppress(OSError):
                supervisor_commands.send_command(child.orders, order, way)

    def _living(self) -> list[Child]:
        return [child for child in self.children if child.pid]


def _begin(supervisor: int, *, others: set[int]) -> None:
    """The first steps of a child: it dies with its supervisor, and only that one's orders end it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (signal.SIGHUP, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    for descriptor in others:
        os.close(descriptor)


def _end(body: Callable[[ChildSpec], None], birth: ChildSpec) -> NoReturn:
    status = 1
    try:
        body(birth)
        status = 0
    except BaseException:  # noqa: BLE001  # nothing of it may reach the supervisor's own frames
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _words(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
