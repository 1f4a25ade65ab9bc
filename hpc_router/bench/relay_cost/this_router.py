"""This router as a user starts it: a run directory, endpoints in its registry, `python -m launch.router`.

Its policy is the classifier of `topology=sim`, trained from the packaged exemplars; requests that name their model are
not classified, those for `auto` are. There is nothing for a control loop to keep up, so none runs beside it.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import hpc_router
from hpc_router.bench.load.native.engine import NAMES
from hpc_router.bench.relay_cost import requests
from hpc_router.bench.relay_cost.interface import START_S, Relay, RelayPlacement, StartedRelay, answers, last_words
from hpc_router.bench.relay_cost.processes import ProcessGroup, group, on
from hpc_router.errors import LaunchError
from hpc_router.state import registry
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State, leading_router
from hpc_router.state.run_directory import RunDir, make_run

CAPACITY: Final = 100_000
HERE: Final = Path(hpc_router.__file__).parents[1]
OPTIONS: Final = ("topology=sim", "policy=classifier", "router.host=127.0.0.1", "router.reconcile=false")


@dataclass(frozen=True, slots=True)
class ThisRouter:
    """External endpoints: the engine is the next hop."""

    name: str = "router"
    classifies: bool = True
    hops: int = 1
    behind_socket: bool = False
    tree: Path = HERE  # another checkout, to be measured beside this one
    workers: int = 1  # all on the relay's core

    def absent(self) -> str | None:
        return None

    def version(self) -> str:
        return hpc_router.__version__ if self.tree == HERE else ""

    @contextmanager
    def started(self, site: RelayPlacement) -> Iterator[StartedRelay]:
        run = make_run(site.folder / "run")
        for expert in NAMES:
            registry.publish(run.registry, _external(expert, f"http://127.0.0.1:{site.engine.port}"))
        with group() as processes:
            with on(site.cores):
                processes.start(router_argv(run, workers=self.workers), log=site.log, environment=_from(self.tree))
            yield _await(run, processes, site, models=(*NAMES, "auto"))


@dataclass(frozen=True, slots=True)
class RouterAndAgent:
    """An agent's data path between the two, on the same core; behind it the engine's socket."""

    name: str = "router+agent"
    classifies: bool = False
    hops: int = 2
    behind_socket: bool = True

    def absent(self) -> str | None:
        return None

    def version(self) -> str:
        return hpc_router.__version__

    @contextmanager
    def started(self, site: RelayPlacement) -> Iterator[StartedRelay]:
        run = make_run(site.folder / "run")
        assert site.engine.socket is not None
        with group() as processes:
            with on(site.cores):
                processes.start(agent_argv(run, site.engine.socket), log=site.log, environment=_from(HERE))
                processes.start(router_argv(run), log=site.log, environment=_from(HERE))
            yield _await(run, processes, site, models=(requests.MODEL,))


def ours(trees: Mapping[str, Path] | None = None) -> list[Relay]:
    others = [ThisRouter(name=name, tree=tree) for name, tree in (trees or {}).items()]
    return [ThisRouter(), ThisRouter(name="router-2-workers", classifies=False, workers=2), RouterAndAgent(), *others]


def router_argv(run: RunDir, *, workers: int = 1) -> list[str]:
    return [sys.executable, "-m", "launch.router", f"run={run.path}", f"router.workers={workers}", *OPTIONS]


def agent_argv(run: RunDir, socket: Path) -> list[str]:
    replica = registry.replica_name(requests.MODEL, 0, 1)
    words = ["--run", str(run.path), "--replica", replica, "--socket", str(socket)]
    return [sys.executable, "-m", "hpc_router.bench.relay_cost.agent_relay_only", *words]


def _from(tree: Path) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{tree}{os.pathsep}{before}" if before else str(tree)}


def _external(expert: str, url: str) -> Record:
    return Record(
        kind=RecordKind.EXTERNAL,
        replica=registry.replica_name(expert, "x0", 1),
        url=url,
        state=State.READY,
        serves={expert: expert},
        capacity=CAPACITY,
    )


def _await(run: RunDir, processes: ProcessGroup, site: RelayPlacement, *, models: tuple[str, ...]) -> StartedRelay:
    """Until the router answers for all of these."""
    deadline = time.monotonic() + START_S
    waiting = list(models)
    while True:
        record = leading_router(RegistryReader(run.registry).snapshot())
        if record is not None:
            started = StartedRelay(int(record.url.rpartition(":")[2]), processes, run.token())
            while waiting and answers(started, waiting[0]):
                waiting.pop(0)
            if not waiting:
                return started
        if processes.died():
            raise LaunchError(f"it ended while starting: {last_words(site.log)}")
        if time.monotonic() > deadline:
            raise LaunchError(f"it does not serve within {START_S:g} s: {last_words(site.log)}")
        time.sleep(0.05)
