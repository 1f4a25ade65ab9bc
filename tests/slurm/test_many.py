"""Sixty-four replicas on large nodes: the time until the router knows all of them, and their memory."""

import re
import time
from pathlib import Path
from typing import Any, Final

import pytest

from hpc_router.net.http_client import call_blocking
from tests.slurm.cluster import SlurmCluster
from tests.slurm.deployment import on_slurm
from tests.support.waiting import eventually_sync

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(900)]

EACH: Final = 16
EXPERTS: Final = ("code", "math", "medicine", "law")
FOUND_WITHIN_S: Final = 5.0


def memory_mb(run: Path) -> dict[str, float]:
    """Proportional set size in MB of all processes of a run, by kind of process."""
    found: dict[str, float] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            rollup = (process / "smaps_rollup").read_text()
        except OSError:
            continue
        kind = next((kind for kind in ("hpc_router.sim", "hpc_router.expert", "guard.py", "hpc_router.router",
                                       "reconcile", "srun") if kind in words), None)  # fmt: skip
        size = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        if kind is not None and size is not None and (str(run) in words or kind in ("hpc_router.sim", "guard.py")):
            found[kind] = found.get(kind, 0.0) + int(size[1]) / 1024
    return found


def test_sixty_four_replicas_are_found_within_seconds_of_the_last(machine: None) -> None:
    with SlurmCluster(node_cpus=24) as cluster:
        counts = [f"experts.{name}.replicas={EACH}" for name in EXPERTS]
        overrides = ["topology=sim", "experts.generalist.replicas=0", "policy.fallback=null", *counts]
        began_at = time.time()
        with on_slurm(cluster, "many", *overrides, wait_all=False) as one:
            url, token = one.url, one.token

            def known() -> dict[str, Any] | None:
                """The router's own view, once all are ready in it."""
                status = call_blocking("GET", f"{url}/status", token=token, timeout_s=10).body
                ready = [r for e in status["experts"].values() for r in e["replicas"] if r["state"] == "ready"]
                return status if len(ready) == EACH * len(EXPERTS) else None

            eventually_sync(known, within_s=600, every_s=0.2)
            found_at = time.time()
            progress = [one.job(replica).progress() for name in EXPERTS for replica in one.claimed(name)]
            last_at = max(p.ready_at for p in progress if p is not None and p.ready_at is not None)
            sizes = memory_mb(one.run)
            total = sum(sizes.values())
            print(f"\n{EACH * len(EXPERTS)} replicas ready {last_at - began_at:.0f} s after `up` began")
            print(f"the router had them all {found_at - last_at:.1f} s after the last")
            print("memory (PSS): " + ", ".join(f"{kind} {mb:.0f} MB" for kind, mb in sorted(sizes.items())))
            print(f"{total / EACH / len(EXPERTS):.0f} MB for each replica, {total:.0f} MB in all")
            assert found_at - last_at <= FOUND_WITHIN_S
            answers = [one.client().chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])
                       for name in EXPERTS]  # fmt: skip
            assert [answer.model for answer in answers] == list(EXPERTS)
