"""Signals of a job while a stream is open, for both ways in which Slurm finds the processes to signal.

Under proctrack/linuxproc, every process of a step is signalled, also engines and ranks. Under proctrack/cgroup, only
the task is signalled, which is the agent.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from hpc_router.state.job_records import Exit
from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.configuration import PROCTRACKS, Proctrack
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.support.needs import need
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

TOKENS = 120
OVERRIDES = (
    "topology=sim",
    "policy.fallback=null",
    *(f"experts.{name}.replicas=0" for name in ("medicine", "law", "generalist")),
    *(f"experts.{name}.engine.options={{ttft_ms: 0, itl_ms: 50, extra: {{drain-s: 0}}}}" for name in ("code", "math")),
    "experts.math.resources.nodes=2",
    "cluster.trusted_network=true",
    "router.resources.sbatch={nodelist: c1}",
    "cluster.walltime=30",
    "cluster.warn_s=60",
    "cluster.drain_s=60",
    "router.drain_s=60",
)


@pytest.fixture(scope="module", params=PROCTRACKS)
def proctrack(request: pytest.FixtureRequest) -> Proctrack:
    chosen: Proctrack = request.param
    lack = lacking(chosen)
    need(not lack, lack)
    return chosen


@pytest.fixture(scope="module")
def deployed(proctrack: Proctrack) -> Iterator[OnSlurm]:
    with (
        SlurmCluster(accounting=False, proctrack=proctrack) as cluster,
        on_slurm(cluster, "signals", *OVERRIDES) as one,
    ):
        yield one


class Stream:
    """An answer of some seconds, of which the first token was read."""

    def __init__(self, client: openai.OpenAI, model: str) -> None:
        asked: list[Any] = [{"role": "user", "content": "hi"}]
        self._events = iter(
            client.chat.completions.create(
                model=model, messages=asked, max_tokens=TOKENS, stream=True, extra_body={"ignore_eos": True}
            )
        )
        self._next()

    def _next(self) -> str | None:
        return next(self._events).choices[0].finish_reason

    def end(self) -> str | None:
        """Reads to the end and returns the finish reason. Raises openai.APIError for an answer that was cut off."""
        reason = None
        for event in self._events:
            reason = event.choices[0].finish_reason or reason
        return reason


@contextmanager
def open_stream(deployed: OnSlurm, model: str) -> Iterator[Stream]:
    with deployed.client() as client:
        yield Stream(client, model)


def ended(deployed: OnSlurm, replica: str) -> Exit:
    return eventually_sync(deployed.job(replica).exit, every_s=0.1)


@pytest.mark.parametrize("number", ["USR2", "USR1"])
@pytest.mark.parametrize("expert", [pytest.param("code", marks=pytest.mark.newest), "math"])
def test_the_walltime_warning_cuts_no_answer(deployed: OnSlurm, expert: str, number: str) -> None:
    """Neither an engine nor one of its ranks ends, on one node and on two. A job of the user, in which replicas are
    steps, may ask for SIGUSR1."""
    replica = deployed.newest(f"{expert}-0")
    with open_stream(deployed, expert) as stream:
        deployed.cluster.run(["scancel", f"--signal={number}", deployed.job_id(replica)])
        assert stream.end() == "length"
    end = ended(deployed, replica)
    assert (end.ok, end.reason, end.cut) == (True, "drained", 0), end
    deployed.until_ready(f"{expert}-0", after=replica)


def test_a_jobs_sigterm_reaches_the_engine_only_under_linuxproc(deployed: OnSlurm, proctrack: Proctrack) -> None:
    """There, an answer that is cut off never looks complete, and `plan` warns of it."""
    replica = deployed.newest("code-0")
    reached = proctrack == "linuxproc"
    with open_stream(deployed, "code") as stream:
        deployed.cluster.run(["scancel", "--signal=TERM", deployed.job_id(replica)])
        if reached:
            with pytest.raises(openai.APIError):
                stream.end()
        else:
            assert stream.end() == "length"
    end = ended(deployed, replica)
    # An answer that the engine itself ends is complete for the agent; the router tells the client that it was cut.
    assert (end.ok, end.reason, end.cut) == (True, "drained", 0), end
    deployed.until_ready("code-0", after=replica)
    assert json.loads(deployed.verb("why", "code", "--json").stdout) == []
    note = "this Slurm (proctrack/linuxproc) sends a job's SIGTERM to the engine too"
    assert (note in plan(deployed)) is reached


def plan(deployed: OnSlurm) -> str:
    done: subprocess.CompletedProcess[str] = deployed.verb("plan", *deployed.overrides)
    return done.stdout + done.stderr


def test_the_routers_walltime_warning_cuts_no_answer(deployed: OnSlurm) -> None:
    """It does not end the control loop either, which is a process of the router's job."""
    router = deployed.serving("router-0")
    with open_stream(deployed, "code") as stream:
        deployed.cluster.run(["scancel", "--signal=USR2", deployed.job_id(router)])
        assert stream.end() == "length"
    end = ended(deployed, router)
    assert (end.ok, end.reason, end.cut) == (True, "drained", 0), end
    said = deployed.job(router).agent_log.read_text()
    assert "the control loop ended" not in said
