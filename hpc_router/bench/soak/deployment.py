"""The deployment that is struck: brought up and taken down by the command line, as anybody would, and looked at.

It lies in a folder of its own with a short name, so that sockets fit; the folder goes with it unless it is to be kept.
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

from hpc_router.bench.soak.options import FaultTarget
from hpc_router.bench.soak.verdict import Struck
from hpc_router.errors import LaunchError
from hpc_router.state.run_directory import RunDir

START_S: Final = 300.0
ASK_S: Final = 5.0


@dataclass(slots=True)
class SoakDeployment:
    run: RunDir
    host: str
    port: int
    token: str
    router: str
    keep: bool = False
    _seen: dict[str, Any] | None = None  # what it said last
    _struck: dict[str, int] = field(default_factory=dict)  # by name, in what order

    def status(self) -> dict[str, Any] | None:
        """None when it does not answer just now."""
        text = self._get("/status")
        value = None if text is None else json.loads(text)
        self._seen = value or self._seen
        return value if isinstance(value, dict) else None

    def gauges(self) -> dict[str, float] | None:
        """What must be zero when nobody asks for anything."""
        text = self._get("/metrics")
        if text is None:
            return None
        pairs = (line.rpartition(" ") for line in text.split("\n") if not line.startswith("#"))
        return {
            name: float(value)
            for name, _, value in pairs
            if name.partition("{")[0].endswith(("requests_in_flight", "requests_waiting"))
        }

    def strike(self, target: FaultTarget) -> Struck | None:
        """Kill the one of these whose turn it is, by what was seen last. None: there is none to be killed now."""
        status = self._seen or self.status()
        if status is None:
            return None
        pids = self.replicas(status) if target is FaultTarget.REPLICA else self.processes(status, target)
        if not pids:
            return None
        name = whose_turn(pids, self._struck)
        self._struck[name] = len(self._struck)
        struck = Struck(target, name, time.monotonic_ns())
        with suppress(ProcessLookupError):
            os.kill(pids[name], signal.SIGKILL)
            return struck
        return None

    def replicas(self, status: dict[str, Any]) -> dict[str, int]:
        """The agents of those that may be killed."""
        found = {name: self._pid(name) for name in spare(status["experts"], struck=self._struck)}
        return {name: pid for name, pid in found.items() if pid is not None}

    def processes(self, status: dict[str, Any], target: FaultTarget | None = None) -> dict[str, int]:
        """Those of the router, or of one kind, by name."""
        workers = [worker for worker in status["router"].get("workers") or () if worker.get("serving")]
        found = {f"worker {worker['worker']}": worker["pid"] for worker in workers}
        control = {"control": pid} if (pid := (status["router"].get("control") or {}).get("pid")) else {}
        if target is FaultTarget.WORKER:
            return found
        if target is FaultTarget.CONTROL:
            return control
        main = self._pid(self.router)
        return found | control | ({} if main is None else {"router": main})

    def _pid(self, replica: str) -> int | None:
        try:
            progress = json.loads((self.run.jobs / replica / "progress.json").read_text())
            pid = int(progress["pid"])
            return pid if any(str(self.run.path) in word for word in psutil.Process(pid).cmdline()) else None
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None

    def _get(self, path: str) -> str | None:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ASK_S)
        try:
            connection.request("GET", path, headers={"authorization": f"Bearer {self.token}"})
            response = connection.getresponse()
            text = response.read().decode()
            return text if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


def spare(experts: Mapping[str, Any], *, struck: Collection[str]) -> list[str]:
    """The replicas that are ready, and not the last of their expert; the router may not know yet who was struck."""
    found = []
    for expert in experts.values():
        ready = [r["replica"] for r in expert["replicas"] if r["state"] == "ready" and r["replica"] not in struck]
        found += ready if len(ready) > 1 else []
    return found


def whose_turn(names: Collection[str], struck: Mapping[str, int]) -> str:
    """Where nobody was struck, or not for longest: a generation takes the place of the one before."""
    last: dict[str, int] = {}
    for name, order in struck.items():
        last[_place(name)] = max(order, last.get(_place(name), -1))
    return min(sorted(names), key=lambda name: last.get(_place(name), -1))


def _place(name: str) -> str:
    return name.rpartition(".")[0] or name


@contextmanager
def deployed(overrides: Sequence[str]) -> Iterator[SoakDeployment]:
    """Up until the end of the block, with every replica. Raises LaunchError."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    run = folder / "run"
    site: SoakDeployment | None = None
    try:
        _verb("up", "--run", str(run), "--wait", "all", f"cluster.scratch={folder}", *overrides)
        url = urlsplit(_verb("url", "--run", str(run)).strip())
        made = RunDir(run)
        router = json.loads(_verb("status", "--run", str(run), "--json"))["router"]["replica"]
        site = SoakDeployment(made, url.hostname or "", url.port or 0, made.token(), router)
        yield site
    finally:
        if run.exists():
            _verb("down", "--run", str(run), check=False)
        if site is None or not site.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _verb(*words: str, check: bool = True) -> str:
    argv = [sys.executable, "-m", "hpc_router.cli", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=START_S, check=False)
    if check and done.returncode:
        raise LaunchError(f"hpc-router {words[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
