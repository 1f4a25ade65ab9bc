"""One expert on two nodes of a real Slurm, started by hand and by `up`: its ranks connect over the network and end
together."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from hpc_router.config import frozen
from hpc_router.config.schema import (
    ClusterConfig,
    Deployment,
    EngineConfig,
    ExpertConfig,
    PolicyConfig,
    ResourceConfig,
)
from hpc_router.net import protocol
from hpc_router.net.auth import replica_key
from hpc_router.state.job_records import Exit, FailureReason, JobDir, Runner
from hpc_router.state.registry import Record, RegistryReader, State
from hpc_router.state.run_directory import RunDir, make_run
from launch import tiny_model
from tests.slurm.cluster import SlurmCluster
from tests.slurm.configuration import SLURMD_TIMEOUT_S
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.slurm.host import SlurmClusterError
from tests.support.needs import VLLM_ENV, engine_python
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

NODES = ("n1", "n2")
REPLICA = "big-h0.g1"
SCRIPT = """\
#!/bin/bash
srun --nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --kill-on-bad-exit=0 {python} -m launch.expert run={run} name=big
"""


@dataclass(frozen=True)
class Started:
    """A batch job of two nodes with one step, as a user would submit it."""

    cluster: SlurmCluster
    run: RunDir
    number: str

    @property
    def job(self) -> JobDir:
        return JobDir(self.run, REPLICA)

    @property
    def record(self) -> Record | None:
        return RegistryReader(self.run.registry).snapshot().get(REPLICA)

    def ready(self, *, within_s: float) -> Record:
        def look() -> Record | None:
            assert self.job.exit() is None, self.log()
            return record if (record := self.record) is not None and record.state is State.READY else None

        return eventually_sync(look, within_s=within_s)

    def ended(self, *, within_s: float) -> Exit:
        return eventually_sync(self.job.exit, within_s=within_s)

    def ask(self, record: Record) -> str:
        assert record.nonce is not None
        return asyncio.run(_ask(record.url, replica_key(self.run.secret(), record.nonce)))

    def processes(self, node: str, word: str) -> list[str]:
        """The engine's processes on a node."""
        try:
            return self.cluster.node(node).enter(["pgrep", "--full", "--", word]).split()
        except SlurmClusterError:
            return []

    def log(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.run.logs.iterdir()))


async def _ask(url: str, key: str) -> str:
    headers = {"authorization": f"Bearer {key}"}
    body: dict[str, Any] = {"model": "big", "messages": [{"role": "user", "content": "two and two"}], "max_tokens": 8}
    async with (
        aiohttp.ClientSession(url, headers=headers) as session,
        session.post(protocol.CHAT, json=body) as response,
    ):
        assert response.status == 200
        return str((await response.json())["choices"][0]["message"]["content"])


def start(cluster: SlurmCluster, name: str, expert: ExpertConfig, *, beat_s: float) -> Started:
    run = make_run(cluster.shared / name)
    settings = ClusterConfig(kind="slurm", trusted_network=True, beat_s=beat_s, offline=True)
    deployment = Deployment(experts={"big": expert}, cluster=settings, policy=PolicyConfig(kind="model_field"))
    run.config.write_text(frozen.to_yaml(deployment))
    script = run.path / "by-hand.sh"
    script.write_text(SCRIPT.format(python=sys.executable, run=run.path))
    # fmt: off
    number = cluster.run(["sbatch", "--parsable", "--no-requeue", f"--nodelist={','.join(NODES)}", "--nodes=2",
                          "--ntasks-per-node=1", "--cpus-per-task=2", "--exclusive", "--mem=6000",
                          f"--output={run.logs}/slurm.log", str(script)]).strip()
    # fmt: on
    return Started(cluster, run, number)


@pytest.fixture
def left_as_found(cluster: SlurmCluster) -> Iterator[None]:
    """Ends all jobs and brings every node up after a test. Slurm is told that a node was lost, because it would notice
    later."""
    yield
    cluster.run(["scancel", "--user=root"])
    bring_back(cluster)
    cluster.wait_idle(within_s=4 * SLURMD_TIMEOUT_S)


def bring_back(cluster: SlurmCluster) -> None:
    for name in (*NODES, "n3"):
        try:
            cluster.node(name).enter(["true"])
        except SlurmClusterError:
            cluster.run(["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost"])
            cluster.node(name).restart()


@pytest.mark.usefixtures("left_as_found")
def test_the_loss_of_the_first_node_ends_the_other_rank(cluster: SlurmCluster) -> None:
    """The rank ends before Slurm itself has noticed the loss."""
    engine = EngineConfig(kind="sim", options={"ttft_ms": 0.0, "itl_ms": 0.0})
    expert = ExpertConfig(model="m", engine=engine, resources=ResourceConfig(nodes=2))
    started = start(cluster, "first-lost", expert, beat_s=0.25)
    record = started.ready(within_s=60)
    assert started.ask(record)
    info, process = started.job.info(), started.job.process()
    assert info is not None
    assert process is not None
    assert (info.job_id, info.runner, info.shared) == (started.number, Runner.STEP, True)
    assert (process.host, process.step_id, record.node, record.job_id) == ("n1", "0", "n1", started.number)
    word = "hpc_router.sim"
    assert started.processes("n2", word)
    cluster.node("n1").kill()
    eventually_sync(lambda: not started.processes("n2", word), within_s=SLURMD_TIMEOUT_S)
    end = started.ended(within_s=SLURMD_TIMEOUT_S)
    assert (end.ok, end.reason) == (False, FailureReason.RANK_LOST)
    assert end.message.endswith("to rank 1 on n2")


def test_a_killed_rank_ends_its_job_and_another_takes_its_place(cluster: SlurmCluster) -> None:
    """The job is one that `hpc-router up` submits."""
    overrides = (
        "topology=sim",
        "policy=model_field",
        "policy.fallback=null",
        *(f"experts.{name}.replicas=0" for name in ("code", "law", "medicine", "generalist")),
        "experts.math.resources.nodes=2",
        "experts.math.resources.exclusive=true",
        "router.resources.sbatch={nodelist: c1}",
        "cluster.walltime=30",
        "cluster.warn_s=60",
    )
    with on_slurm(cluster, "rank-killed", *overrides) as deployed:
        first = deployed.serving("math-0")
        record = deployed.record(first)
        assert record is not None
        assert record["node"] == "n1"
        body = cluster.node("n2").enter(["pgrep", "--full", "--", f"hpc_router.expert --run {deployed.run}"]).split()[0]
        cluster.node("n2").enter(["kill", "-KILL", body])
        second = deployed.until_ready("math-0", after=first)
        end = deployed.job(first).exit()
        assert end is not None
        assert (end.ok, end.reason) == (False, FailureReason.RANK_LOST), deployed.job(first).agent_log.read_text()
        with deployed.client() as client:
            assert client.completions.create(model="math", prompt="once", max_tokens=2).choices[0].text
        assert second == "math-0.g2"


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.timeout(800)  # two starts of vLLM on two nodes, beside whatever else the machine runs
@pytest.mark.usefixtures("left_as_found")
@pytest.mark.parametrize("frontend", ["python", "rust"])
def test_vllm_on_two_nodes_serves_its_domain_and_outlives_the_loss_of_either(
    cluster: SlurmCluster, frontend: str
) -> None:
    """Both ranks end whichever node is lost, and the control loop starts the replica on the remaining nodes."""
    model = cluster.shared / "tiny"
    subprocess.run([engine_python("transformers"), tiny_model.__file__, model], check=True)
    options = (
        f"frontend: {frontend}, device: cpu, dtype: bfloat16, max_model_len: 512, tensor_parallel_size: 2, "
        "extra: {enforce-eager: true}"
    )
    overrides = (
        "topology=sim",
        "policy.fallback=null",
        "experts.generalist.replicas=0",
        f"experts.math.model={model}",
        f"experts.math.engine={{kind: vllm, python: {engine_python('vllm')}, threads: 1}}",
        f"experts.math.engine.options={{{options}}}",
        "experts.math.resources={nodes: 2, cpus: 2, gpus: 1}",
        "router.resources.sbatch={nodelist: c1}",
        "cluster.trusted_network=true",
        "cluster.beat_s=0.5",
        f"cluster.env={VLLM_ENV}",
    )
    with on_slurm(cluster, f"vllm-{frontend}", *overrides) as deployed:
        try:
            first = deployed.serving("math-0")
            leader, other = leaders_node(deployed, first), other_rank(deployed, first)
            answers_of_its_domain(deployed)
            engines = engines_on(deployed, leader)
            assert engines
            cluster.node(other).kill()
            eventually_sync(lambda: not engines & engines_on(deployed, leader), within_s=20, every_s=0.2)
            second = deployed.until_ready("math-0", after=first, within_s=150)
            end = deployed.job(first).exit()
            assert end is not None
            assert (end.ok, end.reason) == (False, FailureReason.RANK_LOST), end
            answers_of_its_domain(deployed)
            leader, follower = leaders_node(deployed, second), other_rank(deployed, second)
            assert other not in (leader, follower)
            engines = engines_on(deployed, follower)
            assert engines
            cluster.node(leader).kill()
            eventually_sync(lambda: not engines & engines_on(deployed, follower), within_s=20, every_s=0.2)
        finally:
            bring_back(cluster)


def leaders_node(deployed: OnSlurm, replica: str) -> str:
    process = deployed.job(replica).process()
    assert process is not None
    return process.host


def other_rank(deployed: OnSlurm, replica: str) -> str:
    """The node of rank 1."""
    shown = deployed.cluster.run(["scontrol", "show", "hostnames", deployed.nodes_of(replica)]).split()
    (other,) = set(shown) - {leaders_node(deployed, replica)}
    return other


def engines_on(deployed: OnSlurm, node: str) -> set[str]:
    """The processes of vLLM on this node."""
    try:
        return set(deployed.cluster.node(node).enter(["pgrep", "--full", "--", "vllm|VLLM"]).split())
    except SlurmClusterError:
        return set()


def answers_of_its_domain(deployed: OnSlurm) -> None:
    with deployed.client() as client:
        # The router may not have read the new record yet. A request by name waits for that, one to `auto` does not.
        client.completions.create(model="math", prompt="once", max_tokens=2)
        raw = client.chat.completions.with_raw_response.create(
            model="auto",
            messages=[{"role": "user", "content": "What is the derivative of x^3 + 2x?"}],
            max_tokens=8,
        )
        assert (raw.headers["x-expert"], raw.headers["x-route-reason"]) == ("math", "classified")
        assert raw.parse().usage is not None
