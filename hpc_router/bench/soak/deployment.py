"""The deployment of a soak: starts and stops it with the command line, observes it over HTTP, and kills its processes.

Its run directory is in a temporary folder with a short name, because the path of a unix socket is limited to 107 bytes.
The folder is removed with the deployment, unless it is kept for its logs.
"""

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

import psutil

from hpc_router.bench.soak.options import FaultTarget
from hpc_router.bench.soak.verdict import InjectedFault
from hpc_router.errors import LaunchError
from hpc_router.net.http_client import Unreachable, call_blocking
from hpc_router.state.run_directory import RunDir

COMMAND_TIMEOUT_S: Final = 300.0
HTTP_TIMEOUT_S: Final = 5.0


@dataclass(slots=True)
class SoakDeployment:
    """A running deployment. `router`: name of the router's job. `keep`: whether to keep the deployment's folder, with
    its logs, when it is stopped."""

    run: RunDir
    url: str
    token: str
    router: str
    keep: bool = False
    _last_status: dict[str, Any] | None = None
    _killed: dict[str, int] = field(default_factory=dict)  # name of each killed process -> its number in order

    def status(self) -> dict[str, Any] | None:
        """Returns the router's `/status`; None if the router does not respond."""
        status = self._get("/status")
        self._last_status = status or self._last_status
        return status if isinstance(status, dict) else None

    def gauges(self) -> dict[str, float] | None:
        """Returns the router's counts of requests in flight and waiting, by metric; all are zero when it is idle. None
        if the router does not respond."""
        text = self._get("/metrics")
        if text is None:
            return None
        pairs = (line.rpartition(" ") for line in text.split("\n") if not line.startswith("#"))
        return {
            name: float(value)
            for name, _, value in pairs
            if name.partition("{")[0].endswith(("requests_in_flight", "requests_waiting"))
        }

    def inject(self, target: FaultTarget) -> InjectedFault | None:
        """Kills a process of the kind `target` and returns the fault; None if no such process can be killed now.
        Prefers a process that was never killed, then the one that was killed longest ago; a replica counts as the same
        process as its predecessors."""
        status = self._last_status or self.status()
        if status is None:
            return None
        pids = self.replicas(status) if target is FaultTarget.REPLICA else self.processes(status, target)
        if not pids:
            return None
        name = least_recently_killed(pids, self._killed)
        self._killed[name] = len(self._killed)
        fault = InjectedFault(target, name, time.monotonic_ns())
        with suppress(ProcessLookupError):
            os.kill(pids[name], signal.SIGKILL)
            return fault
        return None

    def replicas(self, status: dict[str, Any]) -> dict[str, int]:
        """Returns the replicas in `status` that may be killed now: name -> process id of the agent."""
        found = {name: self._pid(name) for name in killable(status["experts"], killed=self._killed)}
        return {name: pid for name, pid in found.items() if pid is not None}

    def processes(self, status: dict[str, Any], target: FaultTarget | None = None) -> dict[str, int]:
        """Returns the router's processes in `status`: name -> process id. With `target`, only those of that kind."""
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
        """Returns the process id in the replica's progress file; None if that process has ended."""
        try:
            progress = json.loads((self.run.jobs / replica / "progress.json").read_text())
            pid = int(progress["pid"])
            return pid if any(str(self.run.path) in word for word in psutil.Process(pid).cmdline()) else None
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None

    def _get(self, path: str) -> Any:
        """Returns the body of the router's response at `path`, as JSON or text; None unless its status is 200."""
        try:
            response = call_blocking("GET", f"{self.url}{path}", token=self.token, timeout_s=HTTP_TIMEOUT_S)
        except Unreachable:
            return None
        return response.body if response.status == 200 else None


def killable(experts: Mapping[str, Any], *, killed: Collection[str]) -> list[str]:
    """Returns the ready replicas that may be killed: those of experts that have another ready replica. A replica in
    `killed` does not count as ready, because the router may not have noticed its end yet."""
    found = []
    for expert in experts.values():
        ready = [r["replica"] for r in expert["replicas"] if r["state"] == "ready" and r["replica"] not in killed]
        found += ready if len(ready) > 1 else []
    return found


def least_recently_killed(names: Collection[str], killed: Mapping[str, int]) -> str:
    """Returns the name in `names` that was never killed, or else was killed longest ago. All generations of a replica's
    slot count as one process. `killed`: name of a killed process -> its place in the order of kills."""
    last: dict[str, int] = {}
    for name, order in killed.items():
        last[_slot(name)] = max(order, last.get(_slot(name), -1))
    return min(sorted(names), key=lambda name: last.get(_slot(name), -1))


def _slot(name: str) -> str:
    return name.rpartition(".")[0] or name


@contextmanager
def running_deployment(overrides: Sequence[str]) -> Iterator[SoakDeployment]:
    """Starts a deployment, waits until all replicas are ready, and stops it when the block ends. Raises LaunchError."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    run = folder / "run"
    deployment: SoakDeployment | None = None
    try:
        _cli("up", "--run", str(run), "--wait", "all", f"cluster.scratch={folder}", *overrides)
        url = _cli("url", "--run", str(run)).strip()
        run_dir = RunDir(run)
        router = json.loads(_cli("status", "--run", str(run), "--json"))["router"]["replica"]
        deployment = SoakDeployment(run_dir, url, run_dir.token(), router)
        yield deployment
    finally:
        if run.exists():
            _cli("down", "--run", str(run), check=False)
        if deployment is None or not deployment.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _cli(*arguments: str, check: bool = True) -> str:
    argv = [sys.executable, "-m", "hpc_router.cli", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if check and done.returncode:
        raise LaunchError(f"hpc-router {arguments[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
