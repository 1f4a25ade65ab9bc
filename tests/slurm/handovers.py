"""What tests of handovers share: small deployments with short walltimes, and what to wait for."""

import asyncio
import json
from functools import partial
from typing import Any, Final

from tests.slurm.deployment import OnSlurm
from tests.support.waiting import eventually_sync

OPTIONS: Final = "{ttft_ms: 10, itl_ms: 20, load_s: 2}"
SIM: Final = (
    "topology=sim",
    "policy=model_field",
    "policy.fallback=null",
    *(f"~experts.{n}" for n in ("medicine", "generalist", "code")),
)
QUICK: Final = (
    "router.resources.sbatch={nodelist: c1}",
    "cluster.warn_s=10",
    "cluster.handover_margin_s=0",
    "cluster.ask_s=5",
)


def handed_over(deployed: OnSlurm, slot: str, times: int = 2) -> bool:
    """Whether that many jobs of an expert's slot have ended. A router serves to its end: whether the next one leads."""
    if slot.startswith("router"):
        return f"{slot}.g{times + 1}" in deployed.claimed() and deployed.record(f"{slot}.g{times + 1}") is not None
    return f"{slot}.g{times}" in deployed.claimed() and deployed.job(f"{slot}.g{times}").exit() is not None


def cause_of(deployed: OnSlurm, replica: str, text: str) -> str | None:
    """What `why` says of it, if that has the text."""
    causes: list[dict[str, Any]] = json.loads(deployed.verb("why", "--json").stdout)
    return next((c["what"] for c in causes if c["replica"] == replica and text in c["what"]), None)


async def until_why(deployed: OnSlurm, replica: str, text: str) -> str:
    ask = partial(eventually_sync, partial(cause_of, deployed, replica, text), within_s=120, every_s=2.0)
    return await asyncio.to_thread(ask)
