"""Four experts as four jobs on three nodes, the router as a job on the CPU node, and requests from a fifth host.

All tests use one deployment and depend on their order.
"""

import concurrent.futures
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.slurm.incidents import submitted_once
from tests.support.needs import ROOT
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

EXPERTS: Final = ("code", "math", "medicine", "law")
PROMPTS: Final = {
    "code": "Write a Python function that reverses a linked list.",
    "math": "What is the derivative of x^3 + 2x?",
    "medicine": "What are the symptoms of iron deficiency, and how is it treated?",
    "law": "Can the tenant sue the landlord who keeps the deposit after the lease has ended?",
}
CAPACITY_BACK_S: Final = 20.0
NOTICED_S: Final = 12.0
OVERRIDES: Final = (
    "topology=sim",
    "experts.generalist.replicas=0",
    "policy.fallback=null",
    *(f"experts.{name}.resources.gpus=1" for name in EXPERTS),
    "router.resources.sbatch={nodelist: c1}",
    "cluster.walltime=30",
    "cluster.warn_s=60",
)


@pytest.fixture(scope="module")
def deployed(cluster: SlurmCluster) -> Iterator[OnSlurm]:
    with on_slurm(cluster, "four", *OVERRIDES) as one:
        yield one


@pytest.fixture(autouse=True)
def settled(deployed: OnSlurm) -> None:
    """Each test begins when the newest replica of every expert serves, whatever the one before has ended."""
    for name in EXPERTS:
        slot = f"{name}-0"
        eventually_sync(lambda: deployed.record(deployed.newest(slot)), within_s=90, every_s=0.1)  # noqa: B023


def ask(deployed: OnSlurm, *prompts: str) -> list[dict[str, str]]:
    """Asks from the controller's host, which runs none of the jobs."""
    program = [sys.executable, str(Path(__file__).with_name("asking.py")), str(deployed.run), *prompts]
    said = deployed.cluster.run(["env", f"PYTHONPATH={ROOT}", *program])
    return [json.loads(line) for line in said.splitlines()]


def all_experts_answer(deployed: OnSlurm) -> None:
    serving = [deployed.serving(f"{name}-0") for name in EXPERTS]
    eventually_sync(lambda: deployed.is_found(*serving), every_s=0.1)  # a new router has not found them at once
    answers = ask(deployed, *PROMPTS.values())
    assert [answer["x-expert"] for answer in answers] == list(PROMPTS)
    assert {answer["x-route-reason"] for answer in answers} == {"classified"}
    assert all(answer["answer"] for answer in answers)


def nodes(deployed: OnSlurm) -> dict[str, str]:
    listed = deployed.cluster.run(["squeue", "--noheader", "--states=RUNNING", "--format=%i %N"]).splitlines()
    node_of = dict(line.split() for line in listed)
    return {
        slot: node_of[deployed.job_id(deployed.serving(slot))] for slot in [f"{e}-0" for e in EXPERTS] + ["router-0"]
    }


@pytest.mark.newest
def test_four_jobs_on_three_nodes_and_the_router_on_the_fourth(deployed: OnSlurm) -> None:
    where = nodes(deployed)
    assert where.pop("router-0") == "c1"
    assert set(where.values()) == {"n1", "n2", "n3"}
    assert len({deployed.job_id(f"{name}-0.g1") for name in EXPERTS}) == len(EXPERTS)


@pytest.mark.newest
def test_every_expert_answers_prompts_of_its_domain(deployed: OnSlurm) -> None:
    all_experts_answer(deployed)


def test_each_replica_has_a_gpu_that_no_other_has(deployed: OnSlurm) -> None:
    """Two jobs share a node, and Slurm gives each its own GPU."""
    held = {}
    for name in EXPERTS:
        process = deployed.job(f"{name}-0.g1").process()
        assert process is not None
        environ = deployed.cluster.node(process.host).enter(["cat", f"/proc/{process.pid}/environ"])
        held[name] = (
            process.host,
            dict(word.partition("=")[::2] for word in environ.split("\0"))["CUDA_VISIBLE_DEVICES"],
        )
    assert len(set(held.values())) == len(EXPERTS)


def test_processes_know_their_job_but_have_none_of_its_variables(deployed: OnSlurm) -> None:
    """A SLURM_CPU_BIND that leaks into engines, or into jobs that the loop submits, would put all on one core."""
    process = deployed.job("math-0.g1").process()
    assert process is not None
    words = deployed.cluster.node(process.host).enter(["cat", f"/proc/{process.pid}/environ"]).split("\0")
    names = {word.partition("=")[0] for word in words}
    assert {name for name in names if name.startswith(("SLURM_", "SUBMITIT_", "SBATCH_", "SRUN_"))} <= {"SLURM_CONF"}
    assert f"HPC_ROUTER_JOB_ID={deployed.job_id('math-0.g1')}" in words


def test_up_again_twice_at_once_changes_nothing(deployed: OnSlurm) -> None:
    def jobs() -> list[str]:
        return [replica for name in EXPERTS for replica in deployed.claimed(name)]

    before = jobs()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: deployed.up(), range(2)))
    assert jobs() == before
    assert deployed.job("router-0.g1").ended() is None


def test_status_is_one_screen_with_what_slurm_knows(deployed: OnSlurm) -> None:
    before = len(deployed.slurm_queries())
    status = deployed.status()
    asked = [query for query in deployed.slurm_queries()[before:] if not query.by_loop]
    assert [question.command for question in asked] == ["squeue"]
    for name in EXPERTS:
        (replica,) = status["experts"][name]["replicas"]
        assert (replica["job_state"], replica["state"], replica["in_flight"]) == ("RUNNING", "ready", 0)
        assert replica["node"] in ("n1", "n2", "n3")
        assert 0 < replica["ends_at"] - time.time() <= 30 * 60
    text = deployed.verb("status").stdout
    assert "RUNNING" in text
    assert "29 min" in text or "30 min" in text or "28 min" in text


def test_the_ssh_command_names_the_routers_node(deployed: OnSlurm) -> None:
    line = deployed.verb("url", "--ssh").stdout
    assert f":{deployed.url.rpartition(':')[2]} " in line
    assert deployed.cluster.node("c1").address in line


def test_two_deployments_side_by_side_do_not_see_each_other(deployed: OnSlurm, cluster: SlurmCluster) -> None:
    with on_slurm(cluster, "other", *OVERRIDES, "experts={math: {replicas: 1}}") as other:
        ours, theirs = deployed.status(), other.status()
        assert {r["job_id"] for e in ours["experts"].values() for r in e["replicas"]}.isdisjoint(
            {r["job_id"] for e in theirs["experts"].values() for r in e["replicas"]}
        )
        script = 'curl -s -o /dev/null -w "%{http_code}" -H "Authorization: Bearer $(cat "$1")" "$2/v1/models"'
        for token, url, status in [(other, other, "200"), (deployed, other, "401"), (other, deployed, "401")]:
            said = cluster.run(["bash", "-c", script, "-", str(token.run / "token"), url.url])
            assert said == status
    all_experts_answer(deployed)


def test_a_second_user_reads_nothing_and_calls_nothing(deployed: OnSlurm, cluster: SlurmCluster) -> None:
    for path in ("token", "secret", "config.yaml", "registry", "jobs", "logs", "registry.json"):
        said = cluster.run(["bash", "-c", 'ls "$1" 2>&1 || true', "-", str(deployed.run / path)], user=cluster.user)
        assert "Permission denied" in said
    record = deployed.record(deployed.newest("law-0"))
    assert record is not None
    body = '{"model": "law", "messages": [{"role": "user", "content": "hello"}]}'
    script = (
        'curl -s -o /dev/null -w "%{http_code}" -H "Content-Type: application/json" -d "$2" "$1/v1/chat/completions"'
    )
    for url in (deployed.url, record["url"]):
        assert cluster.run(["bash", "-c", script, "-", url, body], user=cluster.user) == "401"


def test_an_agent_that_is_killed_is_replaced(deployed: OnSlurm) -> None:
    replica = deployed.newest("code-0")
    process = deployed.job(replica).process()
    assert process is not None
    deployed.cluster.node(process.host).enter(["kill", f"-{signal.SIGKILL.value}", str(process.pid)])
    successor = deployed.until_ready("code-0", after=replica)
    assert deployed.start_to_ready_s(successor) < CAPACITY_BACK_S
    # The successor is submitted before that record: Slurm may yet tell another reason for the signal.
    end = eventually_sync(deployed.job(replica).exit, within_s=30)
    assert (end.reason, "signal 9" in end.message) == ("killed", True)


def test_a_node_cut_off_and_a_node_lost_are_replaced(deployed: OnSlurm, cluster: SlurmCluster) -> None:
    """The last node then needs a GPU for each expert. So this comes before a job is preempted or fails to launch: Slurm
    22.05 may count the GPU of such a job as used for ever."""
    where = nodes(deployed)
    cut, lost = sorted({node for node in where.values() if node != "c1"})[:2]
    before = {slot: deployed.newest(slot) for slot, node in where.items() if node in (cut, lost)}
    assert len(before) >= 2
    for node in (cut, lost):  # else Slurm may send successors there, and count their GPUs as used for ever too
        cluster.run(["scontrol", "update", f"nodename={node}", "state=drain", "reason=test"])
    cluster.node(cut).cut_off()
    cluster.node(lost).kill()
    try:
        for slot, replica in before.items():
            successor = deployed.until_ready(slot, after=replica, within_s=120)
            assert deployed.start_to_ready_s(successor) < CAPACITY_BACK_S
        all_experts_answer(deployed)
    finally:
        for node in (cut, lost):
            cluster.run(["scontrol", "update", f"nodename={node}", "state=undrain"])
        cluster.node(cut).reconnect()
        cluster.node(lost).restart()


def kill_without_a_record(deployed: OnSlurm, replica: str, *, with_slurm: bool = False) -> None:
    """Kills the agent and its batch script at once, as the kernel does for memory. Only Slurm knows of the end, and not
    even Slurm `with_slurm`: then the processes that slurmd has started for the job are killed as well."""
    process, job_id = deployed.job(replica).process(), deployed.job_id(replica)
    assert process is not None
    node = deployed.cluster.node(process.host)
    pattern = rf"/job0*{job_id}/slurm_script" + (rf"|slurmstepd: \[{job_id}\." if with_slurm else "")
    others = node.enter(["pgrep", "--full", "--", pattern]).split()
    node.enter(["kill", "-KILL", str(process.pid), *others])


def noticed_s(deployed: OnSlurm, replica: str, *, since: float) -> float:
    """Seconds until its successor was submitted, although the job left no record of its end."""
    slot = replica.partition(".")[0]
    eventually_sync(lambda: deployed.newest(slot) != replica, within_s=60, every_s=0.05)
    took_s = time.monotonic() - since
    assert deployed.job(replica).ended() is None
    deployed.until_ready(slot, after=replica)
    return took_s


def test_a_job_that_ends_without_a_record_is_replaced_within_seconds(deployed: OnSlurm) -> None:
    """Slurm is queried as soon as the agent falls silent."""
    replica, killed_at = deployed.newest("code-0"), time.monotonic()
    kill_without_a_record(deployed, replica)
    took_s = noticed_s(deployed, replica, since=killed_at)
    print(f"replaced after {took_s:.1f} s")
    assert took_s < NOTICED_S


def test_an_agent_that_is_gone_is_replaced_within_seconds_although_slurm_says_that_it_runs(deployed: OnSlurm) -> None:
    """Its port refuses connections. Without that sign it would take as long as for an agent that hangs, 16 s."""
    replica, killed_at = deployed.newest("medicine-0"), time.monotonic()
    kill_without_a_record(deployed, replica, with_slurm=True)
    took_s = noticed_s(deployed, replica, since=killed_at)
    print(f"replaced after {took_s:.1f} s")
    assert took_s < NOTICED_S
    end = eventually_sync(deployed.job(replica).exit, within_s=60)
    found = (end.ok, end.reason, "refused connections" in end.message)
    # Slurm calls it a node failure if slurmd registers meanwhile, and without its batch step; that may be at any time.
    assert found in [(False, "vanished", True), (False, "node_failed", False)]


def test_a_killed_control_loop_is_back_at_once(deployed: OnSlurm) -> None:
    """A job that ends without a record meanwhile is replaced only a little later."""
    replica, killed_at = deployed.newest("law-0"), time.monotonic()
    node = deployed.cluster.node("c1")
    (loop,) = node.enter(["pgrep", "--full", "--", f"reconcile --loop .*{deployed.run}"]).split()
    node.enter(["kill", "-KILL", loop])
    kill_without_a_record(deployed, replica)
    took_s = noticed_s(deployed, replica, since=killed_at)
    print(f"replaced after {took_s:.1f} s")
    assert took_s < NOTICED_S


def test_a_cancelled_job_drains_and_is_replaced(deployed: OnSlurm) -> None:
    replica = deployed.newest("law-0")
    deployed.cluster.run(["scancel", deployed.job_id(replica)])
    successor = deployed.until_ready("law-0", after=replica)
    assert deployed.start_to_ready_s(successor) < CAPACITY_BACK_S
    end = deployed.job(replica).exit()
    assert end is not None
    assert end.ok
    assert end.reason in ("drained", "cancelled"), "the second once Slurm has told the cause"


def test_a_preempted_job_drains_and_is_replaced_elsewhere(deployed: OnSlurm) -> None:
    """Slurm itself would requeue it, and let it wait for two minutes."""
    replica = deployed.newest("math-0")
    node = deployed.nodes_of(replica)
    urgent = ["sbatch", "--parsable", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--wrap=sleep 60"]
    number = deployed.cluster.run(urgent).strip()
    try:
        successor = deployed.until_ready("math-0", after=replica)
        assert deployed.start_to_ready_s(successor) < CAPACITY_BACK_S
        end = deployed.job(replica).exit()
        assert end is not None
        assert end.ok
        assert end.reason in ("drained", "preempted"), "the second once Slurm has told the cause"
        assert deployed.nodes_of(successor) != node
    finally:
        deployed.cluster.run(["scancel", number])


def test_near_its_walltime_a_job_drains_by_itself_and_submitit_counts_nothing(deployed: OnSlurm) -> None:
    """Slurm then sends SIGUSR2, for which submitit would requeue the job three times and then never again."""
    replica = deployed.newest("law-0")
    deployed.cluster.run(["scancel", "--signal=USR2", deployed.job_id(replica)])
    successor = deployed.until_ready("law-0", after=replica)
    assert deployed.job_id(successor) != deployed.job_id(replica)
    assert not list((deployed.run / "jobs" / replica).glob("*_result.pkl"))
    assert "requeue" not in (deployed.run / "logs" / f"{replica}.log").read_text().lower()


def test_drain_ends_a_replica_and_the_next_takes_its_slot(deployed: OnSlurm) -> None:
    replica = deployed.newest("code-0")
    deployed.verb("drain", replica, "--wait")
    end = deployed.job(replica).exit()
    assert end is not None
    assert end.ok
    deployed.until_ready("code-0", after=replica)


def test_the_routers_job_ends_and_its_successor_was_waiting(deployed: OnSlurm, cluster: SlurmCluster) -> None:
    """The control loop ends with its router, so only Slurm can start the next one."""
    standby = deployed.until_standby()
    assert standby == "router-0.g2"
    address = deployed.url
    cluster.run(["scancel", deployed.job_id("router-0.g1")])
    assert deployed.until_ready("router-0", after="router-0.g1") == standby
    assert deployed.url == address, "on the same node it takes the port of the one before"
    all_experts_answer(deployed)
    replica = deployed.newest("law-0")
    cluster.run(["scancel", deployed.job_id(replica)])
    deployed.until_ready("law-0", after=replica)


def test_in_steady_state_slurm_is_queried_once_per_half_minute(deployed: OnSlurm) -> None:
    """Counts the queries of the control loop during all tests above. It makes further queries only around its actions:
    before it replaces a job that fell silent or ended, and once after it has submitted or ended one."""
    asked = [query for query in deployed.slurm_queries() if query.by_loop]
    acted = [json.loads(line) for line in (deployed.run / "events.jsonl").read_text().splitlines()]
    times = [event["at"] for event in acted if event["event"] in ("submitted", "cancel", "kill", "drain", "lost")]
    quiet = [q.at for q in asked if not any(-3 <= q.at - at <= 6 for at in times)]
    assert {question.command for question in asked} == {"squeue"}
    assert all(later - earlier >= 29 for earlier, later in itertools.pairwise(quiet)), quiet


def test_two_experts_and_the_router_that_are_lost_at_once_are_replaced_once(deployed: OnSlurm) -> None:
    """The control loop was beside that router. The one beside its successor finds what happened meanwhile."""
    deployed.until_standby()
    before = deployed.claimed()
    lost = {slot: deployed.serving(slot) for slot in ("router-0", "code-0", "medicine-0")}
    for replica in lost.values():
        process = deployed.job(replica).process()
        assert process is not None
        deployed.cluster.node(process.host).enter(["kill", f"-{signal.SIGKILL.value}", str(process.pid)])
    for slot, replica in lost.items():
        deployed.until_ready(slot, after=replica)
    all_experts_answer(deployed)
    assert submitted_once(deployed, before)


def test_why_shows_the_reason_of_a_waiting_job(deployed: OnSlurm, cluster: SlurmCluster) -> None:
    deployed.verb("scale", "law=12")
    try:

        def causes() -> list[dict[str, Any]]:
            causes: list[dict[str, Any]] = json.loads(deployed.verb("why", "law", "--json").stdout)
            return [cause for cause in causes if cause["pending"]]

        cause = eventually_sync(causes, every_s=1.0)[0]
        assert cause["pending"] in ("Resources", "Priority")
        assert cause["job_state"] == "PENDING"
        assert "wait" in cause["what"]
    finally:
        deployed.verb("scale", "law=1")
    eventually_sync(lambda: len(deployed.queued("law")) == 1, within_s=90, every_s=0.5)


def test_down_leaves_nothing(deployed: OnSlurm) -> None:
    done = deployed.verb("down")
    assert "is down" in done.stdout
    deployed.nothing_left()
