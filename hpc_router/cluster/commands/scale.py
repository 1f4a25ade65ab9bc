"""Changes replica counts in `desired.json`; the control loop then submits or ends jobs."""

import re
from collections.abc import Iterator, Mapping, Sequence

from hpc_router.cluster.commands.drain import unserved_warnings
from hpc_router.cluster.commands.router_access import live_router
from hpc_router.cluster.control_loop import desired_state
from hpc_router.cluster.control_loop.loop import ControlLoop, LoopPass
from hpc_router.cluster.control_loop.slots import all_attempts
from hpc_router.cluster.launchers.slurm.held_job import ask_held_job
from hpc_router.cluster.launchers.slurm.node_fit import allocation_faults, capacity_warnings
from hpc_router.cluster.launchers.slurm.sinfo import ask_site
from hpc_router.cluster.planning.plan import make_plan
from hpc_router.cluster.signals import explaining_interrupt
from hpc_router.config.assignments import unique
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.net.job_environment import current_job_id
from hpc_router.state.registry import Record
from hpc_router.state.run_directory import RunDir


def parse_counts(words: Sequence[str]) -> dict[str, int]:
    """Parses words such as `math=3` into {"math": 3}. Raises ConfigError for other words and for a repeated name."""
    counts = []
    for word in words:
        name, _, count = word.partition("=")
        if not name or not re.fullmatch(r"[0-9]{1,9}", count):
            raise ConfigError(f"scale: '{word}' is not EXPERT=N (valid: an expert and a whole number, such as math=3)")
        counts.append((name, int(count)))
    return unique(counts, where="scale")


def scale(run: RunDir, counts: Mapping[str, int]) -> tuple[Mapping[str, int], list[str]]:
    """Sets the replica counts of the experts in `counts`. Returns the counts of all experts, and warnings. If no router
    serves, runs a pass, because no control loop would then submit or end the jobs. Raises ConfigError if the deployment
    cannot run with these counts."""
    control = ControlLoop(run)
    seen = control.preview()
    desired_state.check_counts(control.deployment, counts)
    asked = {**seen.desired.replicas, **counts}
    wanted = desired_state.with_counts(control.deployment, asked)
    make_plan(wanted, run=run, ask_engines=False)
    desired_state.scale(run, control.deployment, counts, seen.observed)
    run.event("scale", **counts)
    if not seen.desired.down and live_router(run) is None:
        with explaining_interrupt(lambda: "the counts are set; `hpc-router reconcile` submits what is missing"):
            control.run_pass()
    return asked, [*_unserved_warnings(seen, counts, control.observer.records), *_capacity_warnings(wanted, counts)]


def _unserved_warnings(seen: LoopPass, counts: Mapping[str, int], records: Mapping[str, Record]) -> Iterator[str]:
    """Yields a warning for each expert in `counts` that gets the count 0 or loses its last ready replica."""
    for expert, count in counts.items():
        own = [attempt for attempt in all_attempts(seen.observed) if attempt.slot.expert == expert]
        going = [a for a in own if a.live and a.slot.managed and int(a.slot.name) >= count]
        yield from (
            unserved_warnings(seen.observed, going, records.values())
            if count
            else [f"{expert}=0: it has no replicas, and requests for it fail until it is scaled up"]
        )


def _capacity_warnings(wanted: Deployment, counts: Mapping[str, int]) -> list[str]:
    kind, job_id = wanted.cluster.kind, current_job_id()
    try:
        if kind == "slurm" and any(counts.values()):
            return capacity_warnings(wanted, ask_site())
        if kind == "allocation" and job_id is not None and (kinds := ask_held_job(job_id).kinds):
            return allocation_faults(wanted, kinds, f"job {job_id}")
    except LaunchError:  # Slurm does not answer: the counts are set nevertheless
        pass
    return []
