"""Other shapes of the same deployment: several replicas in one job, steps inside a job of the user, and jobs that fail
at their start."""

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from hpc_router.state.job_records import Runner
from tests.e2e.deployment import cli
from tests.slurm.cluster import SlurmCluster
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.support.needs import ROOT
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

FOUR: Final = ("topology=sim", "experts.generalist.replicas=0", "policy.fallback=null")
ONLY_MATH: Final = tuple(f"experts.{name}.replicas=0" for name in ("code", "medicine", "law"))


def answers(one: OnSlurm, expert: str) -> str:
    """The replica that answered."""
    raw = one.client().chat.completions.with_raw_response.create(
        model=expert, messages=[{"role": "user", "content": "hello"}]
    )
    return raw.headers["x-replica"]


def test_replicas_that_share_a_job_start_and_end_independently(cluster: SlurmCluster) -> None:
    sizes = [f"experts.{name}.resources={{gpus: 1, cpus: 2}}" for name in ("code", "math")]
    with on_slurm(cluster, "shared", *FOUR, *sizes, "cluster.replicas_per_job=2") as one:
        assert one.job_id("code-0.g1") == one.job_id("math-0.g1")
        assert one.job_id("medicine-0.g1") == one.job_id("law-0.g1")
        assert len({one.job_id(f"{name}-0.g1") for name in ("router", "code", "law")}) == 3
        code = one.job("code-0.g1").process()
        assert code is not None
        node = cluster.node(code.host)
        math = one.job("math-0.g1").process()
        assert math is not None
        environ = [node.enter(["cat", f"/proc/{p.pid}/environ"]).split("\0") for p in (code, math)]
        gpus = [next(word for word in words if word.startswith("CUDA_VISIBLE_DEVICES=")) for words in environ]
        assert gpus[0] != gpus[1], "each step has its own part of the node"
        for process in (code, math):
            step = cluster.run(["scontrol", "show", "step", f"{one.job_id('code-0.g1')}.{process.step_id}"])
            assert "CPUs=2 " in step, "srun takes the number from no variable of sbatch's since Slurm 22.05"

        node.enter(["kill", f"-{signal.SIGKILL.value}", str(code.pid)])
        successor = one.until_ready("code-0", after="code-0.g1")
        assert one.job_id(successor) != one.job_id("code-0.g1"), "a fresh job"
        assert answers(one, "math") == "math-0.g1"

        one.verb("scale", "medicine=0")
        eventually_sync(lambda: one.job("medicine-0.g1").ended(), every_s=0.1)
        end = one.job("medicine-0.g1").exit()
        assert end is not None
        assert (end.ok, end.reason) == (True, "drained")
        assert answers(one, "law") == "law-0.g1"


HELD: Final = """\
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=6 --gres=gpu:2 --mem-per-cpu=683 --time=10
#SBATCH --output={folder}/held-%j.log
for time in first second; do
    {python} -m hpc_router.cli up --run {run} {overrides} --wait all || exit 1
    touch {folder}/up-$time
    while [[ ! -e {folder}/enough-$time ]]; do sleep 0.2; done
done
{python} -m hpc_router.cli down --run {run}
touch {folder}/down
"""


def test_steps_inside_a_job_of_the_user(cluster: SlurmCluster) -> None:
    folder = cluster.shared / "held"
    folder.mkdir()
    run = folder / "run"
    halves = [f"'experts.{name}.resources={{gpus: 1, memory_gb: 2}}'" for name in ("code", "math", "medicine", "law")]
    overrides = [*FOUR, *halves, "'router.resources={cpus: 1}'", "cluster=allocation"]
    script = folder / "held.sbatch"
    script.write_text(HELD.format(folder=folder, run=run, python=sys.executable, overrides=" ".join(overrides)))
    job_id = cluster.run(["sbatch", "--parsable", f"--chdir={ROOT}", str(script)]).strip()
    one = OnSlurm(run, folder, overrides, cluster=cluster)
    one.record_queries()

    def is_there(name: str) -> bool:
        log = folder / f"held-{job_id}.log"
        assert cluster.run(["squeue", "--noheader", f"--jobs={job_id}"]).strip(), log.read_text()
        return (folder / name).exists()

    try:
        eventually_sync(lambda: is_there("up-first"), within_s=60, every_s=0.5)
        replicas = [f"{name}-0.g1" for name in ("router", "code", "math", "medicine", "law")]
        assert {one.job_id(replica) for replica in replicas} == {job_id}
        processes = {replica: one.job(replica).process() for replica in replicas}
        assert len({p.step_id for p in processes.values() if p is not None}) == len(replicas)
        assert len({p.host for p in processes.values() if p is not None}) == 2, "on both nodes of the allocation"
        assert answers(one, "math") == "math-0.g1"

        victim = processes["math-0.g1"]
        assert victim is not None
        cluster.node(victim.host).enter(["kill", f"-{signal.SIGKILL.value}", str(victim.pid)])
        one.until_ready("math-0", after="math-0.g1")
        assert answers(one, "math") == "math-0.g2"
        assert one.status()["experts"]["math"]["replicas"][0]["job_id"] == job_id

        router = processes["router-0.g1"]
        assert router is not None
        cluster.node(router.host).enter(["kill", f"-{signal.SIGKILL.value}", str(router.pid)])
        eventually_sync(lambda: one.job("router-0.g1").ended(), every_s=0.1)
        (folder / "enough-first").touch()
        eventually_sync(lambda: is_there("up-second"), within_s=60, every_s=0.5)
        assert answers(one, "math") == "math-0.g2", "the other steps hold all memory of the job"
    finally:
        for time in ("first", "second"):
            (folder / f"enough-{time}").touch()
        eventually_sync(
            lambda: not cluster.run(["squeue", "--noheader", f"--jobs={job_id}"]).strip(), within_s=60, every_s=0.5
        )
    assert (folder / "down").exists(), (folder / f"held-{job_id}.log").read_text()
    assert list((run / "registry").iterdir()) == []


IN_A_STEP: Final = """\
#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=4 --gres=gpu:1 --time=5 --output={folder}/step-%j.log
plan() {{
    echo "== $1"
    shift
    timeout 60 "$@" </dev/null
    echo "== status $?"
}}
hpc_router="{python} -m hpc_router.cli plan topology=sim cluster=allocation {one}"
plan srun srun $hpc_router
plan overlap srun --overlap --mem=0 $hpc_router
plan script $hpc_router
plan nodes $hpc_router experts.math.resources.nodes=2 cluster.trusted_network=true
plan gpus $hpc_router experts.math.replicas=2 experts.math.resources.gpus=1
"""


def test_steps_that_can_never_start_are_refused(cluster: SlurmCluster) -> None:
    """One deployment runs inside a step that holds all resources, one is larger than the job. Slurm would let both wait
    for ever."""
    folder = cluster.shared / "in-a-step"
    folder.mkdir()
    one = " ".join(f"experts.{name}.replicas=0" for name in ("code", "medicine", "law", "generalist"))
    script = folder / "step.sbatch"
    script.write_text(
        IN_A_STEP.format(folder=folder, python=sys.executable, one=f"policy=model_field policy.fallback=null {one}")
    )
    job_id = cluster.run(["sbatch", "--parsable", "--wait", f"--chdir={ROOT}", str(script)], timeout_s=120).strip()
    said = (folder / f"step-{job_id}.log").read_text()
    parts = {part.partition("\n")[0]: part for part in said.split("== ") if part}
    status = dict(re.findall(r"== (\w+)\n(?:.*\n)*?== status (\d+)", said))
    assert status == {"srun": "2", "overlap": "0", "script": "0", "nodes": "2", "gpus": "2"}, said
    assert f"beside step {job_id}.0, in which this command runs" in parts["srun"]
    assert "`srun --overlap --mem=0`" in parts["srun"]
    assert f"experts.math.resources.nodes=2: job {job_id} has 1" in parts["nodes"]
    assert f"resources.gpus: job {job_id} has 1, all replicas need 2 (math 2)" in parts["gpus"]


MODULE: Final = """#%Module
setenv FROM_A_MODULE yes
"""


def test_a_site_with_modules_a_fabric_and_no_sbatch_on_its_nodes(cluster: SlurmCluster) -> None:
    """Without sbatch on the nodes, the router and its control loop run where `up` does."""
    modules = cluster.shared / "modules"
    modules.mkdir()
    (modules / "toolchain").write_text(MODULE)
    site = (
        "cluster.modules=[toolchain]",
        "cluster.setup=['export FROM_SETUP=$FROM_A_MODULE']",
        f"cluster.env={{MODULEPATH: {modules}, FROM_CONFIG: 'two words'}}",
        "cluster.fabric=198.18.0.0/15",
        "router.place=here",
    )
    with on_slurm(cluster, "site", *FOUR, *site) as one:
        router, math = one.job("router-0.g1"), one.job("math-0.g1").process()
        info = router.info()
        assert info is not None
        assert info.runner is Runner.PROCESS
        assert math is not None
        words = cluster.node(math.host).enter(["cat", f"/proc/{math.pid}/environ"]).split("\0")
        assert {"FROM_A_MODULE=yes", "FROM_SETUP=yes", "FROM_CONFIG=two words"} <= set(words)
        record = one.record("math-0.g1")
        assert record is not None
        assert record["url"].startswith(f"http://{cluster.node(math.host).address}:")
        assert answers(one, "math") == "math-0.g1"
        cluster.run(["scancel", one.job_id("math-0.g1")])
        one.until_ready("math-0", after="math-0.g1")
        assert one.status()["router"]["standby"] is None


def test_outside_a_job_no_step_can_start(cluster: SlurmCluster) -> None:
    run = cluster.shared / "nowhere"
    done = cli("up", "--run", str(run), *FOUR, "cluster=allocation", check=False)
    assert done.returncode == 2
    assert "sbatch or salloc" in done.stderr
    assert not run.exists()


def test_a_job_that_dies_at_start_says_why_and_holds_nothing(cluster: SlurmCluster) -> None:
    """The reason is shown within ten seconds."""
    broken = "experts.math.engine.options.faults=[{kind: load_fail, reason: weights}]"
    with on_slurm(cluster, "dead", *FOUR, broken, wait_all=False) as one:

        def failed() -> dict[str, object] | None:
            (replica,) = one.replicas("math")
            return replica if replica["state"] == "failed" else None

        told = eventually_sync(failed, within_s=10, every_s=0.5)
        assert told["reason"] == "weights"
        eventually_sync(lambda: one.job_id("math-0.g1") not in one.queued(), within_s=10, every_s=0.5)
        assert answers(one, "law") == "law-0.g1"
        assert "experts.math.model" in one.verb("why").stdout


def test_a_setup_line_that_fails_is_the_value_to_edit(cluster: SlurmCluster) -> None:
    run = cluster.shared / "setup"
    lines = "cluster.setup=['true', 'ls /no/such/folder']"
    one = OnSlurm(run, cluster.shared, ["cluster=slurm", *FOUR, lines], cluster=cluster)
    done = cli("up", "--run", str(run), *one.overrides, check=False, env=one.environment)
    assert done.returncode == 1
    failed = re.search(r"([\w-]+\.g1)[^\n]*: cluster\.setup\[1\] failed on", done.stderr)
    assert failed is not None, done.stderr
    assert "No such file" in one.verb("logs", failed[1]).stdout, "others may have been ended before their setup"
    assert one.queued() == []


@pytest.mark.newest
def test_a_dependency_that_was_met_is_not_submitted_again(cluster: SlurmCluster) -> None:
    """Successors of all kinds are submitted without it: Slurm 24.11 and later refuse it once they have forgotten that
    job."""
    before = cluster.run(["sbatch", "--parsable", "--begin=now+5", "--output=/dev/null", "--wrap=true"]).strip()
    wish = f"cluster.sbatch={{dependency: afterok:{before}}}"
    with on_slurm(cluster, "dependent", *FOUR, *ONLY_MATH, wish, "router.place=here", wait_all=False) as one:
        first = one.newest("math-0")
        assert script_of(one, first) & {f"#SBATCH --dependency=afterok:{before}"}
        cluster.run(["scancel", one.job_id(first)])
        second = one.until_ready("math-0", after=first)
        assert not [line for line in script_of(one, second) if "--dependency" in line]
        assert "--dependency" not in one.verb("plan", *one.overrides).stdout
        another = cluster.run(["sbatch", "--parsable", "--output=/dev/null", "--wrap=true"]).strip()
        changed = f"cluster.sbatch={{dependency: afterok:{another}}}"
        one.verb("apply", *(changed if word == wish else word for word in one.overrides))
        third = one.until_ready("math-0", after=second)
        assert script_of(one, third) & {f"#SBATCH --dependency=afterok:{another}"}


def test_a_dependency_that_was_met_before_any_job_started_is_not_submitted_again(cluster: SlurmCluster) -> None:
    """All jobs with it wait for GPUs, and one is cancelled there."""
    done = cluster.run(["sbatch", "--parsable", "--output=/dev/null", "--wrap=true"]).strip()
    hog = ["sbatch", "--parsable", "--nodes=3", "--gres=gpu:4", "--output=/dev/null", "--wrap=sleep 600"]
    blocker = cluster.run(hog).strip()
    wish = f"experts.math.resources={{gpus: 1, sbatch: {{dependency: afterok:{done}}}}}"
    others = [f"experts.{name}.replicas=0" for name in ("code", "medicine")]
    try:
        with on_slurm(cluster, "met", *FOUR, *others, wish, "cluster.ask_s=1", wait_all=False) as one:
            first = one.newest("math-0")
            assert script_of(one, first) & {f"#SBATCH --dependency=afterok:{done}"}

            def reason() -> object:
                queued = json.loads((one.run / "squeue.json").read_text())["jobs"]
                return queued.get(one.job_id(first), {}).get("reason")

            eventually_sync(lambda: reason() in ("Resources", "Priority"), every_s=0.2)
            cluster.run(["scancel", one.job_id(first)])
            second = eventually_sync(
                lambda: next((r for r in one.claimed("math-0.g") if r != first and one.job(r).info()), None)
            )
            assert not [line for line in script_of(one, second) if "--dependency" in line]
            cluster.run(["scancel", blocker])
            assert one.until_ready("math-0", after=first) == second
    finally:
        cluster.run(["scancel", blocker])


def test_a_dependency_that_can_never_be_met_is_the_cause_also_afterwards(cluster: SlurmCluster) -> None:
    """`up` ends what it has submitted; `why` still knows the reason."""
    failed = cluster.run(["sbatch", "--parsable", "--output=/dev/null", "--wrap=false"]).strip()
    eventually_sync(lambda: "FAILED" in cluster.run(["squeue", "--states=all", "--format=%T", f"--jobs={failed}"]))
    wish = f"cluster.sbatch={{dependency: afterok:{failed}}}"
    one = OnSlurm(cluster.shared / "never", cluster.shared, ["cluster=slurm", *FOUR, *ONLY_MATH, wish], cluster=cluster)
    done = one.up(check=False)
    assert done.returncode == 1
    assert "DependencyNeverSatisfied: it waits for a job that cannot end" in done.stderr
    assert one.queued() == []
    told = {cause["replica"]: (cause["reason"], cause["message"]) for cause in causes(one)}
    assert set(told) == {"router-0.g1", "math-0.g1"}
    assert all(reason == "refused" and "DependencyNeverSatisfied" in message for reason, message in told.values())


def script_of(one: OnSlurm, replica: str) -> set[str]:
    """The lines of the replica's batch script, as it was submitted."""
    (path,) = one.job(replica).path.glob("*_submission.sh")
    return set(path.read_text().splitlines())


def test_a_run_directory_that_nodes_do_not_see_is_reported_once(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The directory is in /tmp of this machine. No job is submitted twice, and nothing is left."""
    run = tmp_path / "run"
    one = OnSlurm(run, cluster.shared, ["cluster=slurm", *FOUR], cluster=cluster)
    done = cli("up", "--run", str(run), *one.overrides, check=False, env=one.environment)
    assert done.returncode == 1
    print(done.stderr)
    last = done.stderr.splitlines()[-1]
    assert re.match(rf"hpc-router: node (n\d|c1) does not see the run directory {run}: .*a new run there", last)
    assert len(one.claimed()) == 5, "nothing is submitted again"
    assert len([line for line in done.stderr.splitlines() if "does not see" in line]) <= len(one.claimed()) + 2
    assert one.queued() == []


def test_a_single_node_that_does_not_see_the_run_directory_is_named(cluster: SlurmCluster) -> None:
    """Jobs there are submitted again until one starts on another node; `drain` keeps them off the bad node."""
    only = ("experts.code.replicas=0", "experts.medicine.replicas=0", "experts.law.replicas=0")
    with on_slurm(cluster, "blind", *FOUR, *only, "router.resources.sbatch={nodelist: c1}") as one:
        node = one.nodes_of("math-0.g1")
        blind = cluster.node(node)
        process = one.job("math-0.g1").process()
        assert process is not None
        blind.enter(["mount", "-t", "tmpfs", "tmpfs", str(one.run)])
        try:
            blind.enter(["kill", "-KILL", str(process.pid)])
            eventually_sync(lambda: [c for c in causes(one) if f"node {node} does not see" in c["what"] + c["message"]])
            one.verb("drain", node)
            newest = one.newest("math-0")
            one.until_ready("math-0", after="math-0.g1")
            assert one.nodes_of(one.newest("math-0")) != node, newest
        finally:
            blind.enter(["umount", str(one.run)])


def causes(one: OnSlurm) -> list[dict[str, Any]]:
    return [{**cause, "message": cause["message"] or ""} for cause in json.loads(one.verb("why", "--json").stdout)]
