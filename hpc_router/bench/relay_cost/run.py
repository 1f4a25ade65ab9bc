"""One call of `hpc-router bench router`, from its options to its files."""

import json
import os
import platform
import re
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.status import Status

import hpc_router
from hpc_router.bench.load.native.build import built
from hpc_router.bench.record import git_state, hardware, versions
from hpc_router.bench.relay_cost.interface import Relay
from hpc_router.bench.relay_cost.options import RelayCostOptions
from hpc_router.bench.relay_cost.other_relays import peers
from hpc_router.bench.relay_cost.processes import cores_of
from hpc_router.bench.relay_cost.report import RelayCostResults, markdown, to_json
from hpc_router.bench.relay_cost.rounds import measure_all
from hpc_router.bench.relay_cost.this_router import ours
from hpc_router.cluster.signals import sigterm_as_interrupt
from hpc_router.errors import ConfigError, LaunchError, suggest
from hpc_router.state.atomic_files import replace_text

ROOT: Final = Path(hpc_router.__file__).parents[1]
PEERS: Final = ".venv-bench-peers"
DESCRIPTORS: Final = 8
"""Per stream, over all processes and with room to spare; half of them may be one process's."""


def default_out() -> Path:
    return ROOT / "analysis" / "results" if in_clone() else Path.cwd()


def default_peers() -> Path | None:
    return ROOT / PEERS if (ROOT / PEERS).is_dir() else None


def in_clone() -> bool:
    return (ROOT / "pyproject.toml").is_file()


def bench(options: RelayCostOptions, console: Console) -> RelayCostResults:
    """Measure, write both files, and return what they hold. Raises ConfigError and LaunchError."""
    known = [*peers(options.peers), *ours(options.trees)]
    chosen = _chosen(known, options)
    absent = {relay.name: why for relay in chosen if (why := relay.absent()) is not None}
    present = [relay for relay in chosen if relay.name not in absent]
    for name, why in absent.items():
        console.print(f"{name}: {why}", style="yellow", highlight=False)
    if not present:
        raise LaunchError("none of the selected relays is installed")
    for program in ("load", "engine"):
        built(program)
    _raise_file_limit(options.streams)
    cores = cores_of(list(os.sched_getaffinity(0)))
    if not cores.apart:
        console.print("one core for all: the figures say less", style="yellow")
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with sigterm_as_interrupt(), Steps(console) as steps:
        found = measure_all(present, options, cores, steps.tell)
    results = RelayCostResults(options, cores, {one.relay.name: one for one in found}, absent, origin_of(at))
    _write(results, console)
    return results


def origin_of(at: str) -> dict[str, Any]:
    """Where figures of this machine come from: the call, versions, git state, hardware."""
    return {
        "at": at,
        "command": shown_command(sys.argv[1:]),
        "versions": {"python": platform.python_version(), **dict(versions())},
        "git": git_state(ROOT) if in_clone() else None,
        "hardware": {key: value for key, value in hardware().items() if key != "host"},
    }


def shown_command(words: Sequence[str]) -> str:
    """Results are shown around: of folders, their names alone."""
    return shlex.join(["hpc-router", *(re.sub(r"(?<![^=])/(?:[^/]*/)*(?=[^/])", "", word) for word in words)])


def _chosen(known: list[Relay], options: RelayCostOptions) -> list[Relay]:
    names = [relay.name for relay in known]
    for name in options.trees:
        if names.count(name) > 1:
            raise ConfigError(f"--tree {name}=...: there is a relay of that name; give the checkout another")
    for name in options.only:
        if name not in names:
            raise ConfigError(f"--only {name}: no such relay{suggest(name, names)}")
    return [relay for relay in known if not options.only or relay.name in options.only]


def _write(results: RelayCostResults, console: Console) -> None:
    folder = results.options.out
    folder.mkdir(parents=True, exist_ok=True)
    name = f"router-{results.origin['at'].replace('-', '').replace(':', '')}"
    replace_text(folder / f"{name}.json", json.dumps(to_json(results), indent=1, allow_nan=False) + "\n", mode=0o644)
    replace_text(folder / f"{name}.md", markdown(results), mode=0o644)
    console.print(f"written: {folder / name}.json and .md", highlight=False, soft_wrap=True)


def _raise_file_limit(streams: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < streams * DESCRIPTORS // 2:
        raise LaunchError(
            f"{streams} streams need {streams * DESCRIPTORS // 2} open files per process, and {hard} are allowed"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Steps:
    """What is being done: a line that changes on a terminal, else a line for every step."""

    def __init__(self, console: Console) -> None:
        self._console, self._since = console, time.monotonic()
        self._status: Status | None = None

    def __enter__(self) -> "Steps":
        if self._console.is_terminal:
            self._status = self._console.status("", refresh_per_second=2)
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, text: str) -> None:
        told = f"{time.monotonic() - self._since:7.1f} s  {text}"
        if self._status is not None:
            self._status.update(told)
        else:
            self._console.print(told, highlight=False, markup=False, soft_wrap=True)
