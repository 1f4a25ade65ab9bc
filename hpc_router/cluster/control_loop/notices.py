"""Reports problems that people have to solve, by a command or by mail (`cluster.notify`).

The leading loop looks for problems in each pass. Each problem is reported once, and again only after it was gone for
`GONE_S` seconds. A new leading loop, such as that of the router's successor, reports all problems that remain. The
command runs in a thread of its own with a time limit, so that it never delays a pass.
"""

import json
import logging
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from hpc_router.cluster.control_loop.elasticity import ElasticState
from hpc_router.cluster.control_loop.forecast import PlannedHandover
from hpc_router.cluster.control_loop.reconcile import GiveUp
from hpc_router.config.validation import notify_command
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

GONE_S: Final = 600.0
"""Time in seconds after which a problem that has ended is told again if it returns."""
SEND_S: Final = 60.0
"""Time limit of the command in seconds."""
LATE_S: Final = 1.0
"""Minimum expected time without a ready replica, in seconds, for which a successor counts as late."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One problem. `kind`: `gave_up`, `successor_late`, `disk_full` or `budget_reached`. `replica`: the slot that was
    given up, or the replica whose successor is late; else None. `reason`: the problem in words."""

    kind: str
    replica: str | None
    expert: str | None
    reason: str

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        return self.kind, self.replica, self.expert


def problems(
    given_up: Iterable[GiveUp],
    handovers: Iterable[PlannedHandover],
    elastic: Mapping[str, ElasticState],
    full: str | None,
) -> list[Notice]:
    """Returns the present problems. Pure. `elastic`: the experts whose number of replicas follows the demand. `full`:
    why the run directory cannot be written; None if it can."""
    found = [
        Notice("gave_up", str(action.slot), action.slot.expert, f"{action.slot} failed for good: {action.exit.message}")
        for action in given_up
    ]
    for planned in handovers:
        if planned.mode == "overlap" and planned.late_s is not None and planned.late_s >= LATE_S:
            because = f" ({planned.reason})" if planned.reason else ""
            reason = f"the successor of {planned.replica} is expected {planned.late_s:.0f} s late{because}"
            found.append(Notice("successor_late", planned.replica, split_replica(planned.replica)[0], reason))
    for name, state in elastic.items():
        if state.blocked is not None:
            found.append(Notice("budget_reached", None, name, f"{name}: {state.blocked}"))
    if full is not None:
        found.append(Notice("disk_full", None, None, full))
    return found


class Notifier:
    """Reports problems to the user by `notify`, the value of `cluster.notify`. If that is None, reports nothing."""

    def __init__(self, run: RunDir, notify: str | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._notify, self._clock = run, notify, clock
        self._seen: dict[tuple[str, str | None, str | None], float] = {}  # problem -> time at which it was last seen
        self._queue: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def look(self, present: Sequence[Notice]) -> None:
        """Reports each problem in `present` that is new."""
        now = self._clock()
        self._seen = {key: at for key, at in self._seen.items() if now - at <= GONE_S}
        for notice in present:
            if notice.key not in self._seen and self._notify is not None:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="notices", daemon=True)
                    self._thread.start()
                self._queue.put(notice)
            self._seen[notice.key] = now

    def close(self) -> None:
        """Waits until all problems that were found are reported."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (notice := self._queue.get()) is not None:
            try:
                self._send(notice)
            except Exception as error:  # noqa: BLE001  # logged
                logger.warning("cluster.notify: %s could not be told: %s", notice.kind, error)

    def _send(self, notice: Notice) -> None:
        assert self._notify is not None
        content = {"run": str(self._run.path), "at": round(time.time(), 3), **asdict(notice)}
        words, body = notify_command(self._notify), json.dumps(content) + "\n"
        if words is None:
            words, body = mail(self._notify, content)
        done = subprocess.run(words, input=body, capture_output=True, text=True, errors="replace", timeout=SEND_S)
        if done.returncode:
            output = (done.stderr or done.stdout).strip().rpartition("\n")[2]
            raise OSError(f"{words[0]} ended with status {done.returncode}: {output[:300]}")
        logger.info("cluster.notify: told %s: %s", notice.kind, notice.reason)


def mail(address: str, content: Mapping[str, Any]) -> tuple[list[str], str]:
    """Returns the command that mails a problem to `address`, and the text for its stdin. Raises OSError if this node
    has no program that sends mail."""
    what = content["expert"] or "run"
    subject = f"hpc_router: {what}: {content['kind'].replace('_', ' ')}"
    body = f"{content['reason']}\n\nrun: {content['run']}\nmore: hpc-router why --run {content['run']}\n"
    if shutil.which("mail"):
        return ["mail", "-s", subject, address], body
    if program := shutil.which("sendmail") or shutil.which("/usr/sbin/sendmail"):
        return [program, "-t"], f"To: {address}\nSubject: {subject}\n\n{body}"
    raise OSError("this node has neither `mail` nor `sendmail`; give a command instead")
