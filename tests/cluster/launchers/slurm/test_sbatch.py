"""Batch scripts: their text, and what they do when a shell runs them."""

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.cluster.launchers.interface import JobRequest
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob, batch_jobs, effective_options, setup_faults
from hpc_router.config.schema import ClusterConfig, Deployment, ResourceConfig
from hpc_router.state.job_records import Ended, Exit, FailureReason, JobDir, JobInfo, Runner
from hpc_router.state.run_directory import RunDir

RUN = RunDir(Path("/runs/mine"))


def request(replica: str = "math-0.g1", **resources: object) -> JobRequest:
    return JobRequest(replica, ("/bin/true",), ResourceConfig(**resources))  # type: ignore[arg-type]


def jobs(*requests: JobRequest, **cluster: object) -> list[BatchJob]:
    deployment = Deployment(name="demo", cluster=ClusterConfig(kind="slurm", **cluster))  # type: ignore[arg-type]
    return batch_jobs(RUN, deployment, requests)


def script(*requests: JobRequest, **cluster: object) -> str:
    (job,) = jobs(*requests, **cluster)
    return job.script()


@pytest.mark.parametrize(
    ("cluster", "line"),
    [
        ({"partition": "gpu"}, "#SBATCH --partition=gpu"),
        ({"account": "proj1"}, "#SBATCH --account=proj1"),
        ({"qos": "long"}, "#SBATCH --qos=long"),
        ({"constraint": "a100&ib"}, "#SBATCH --constraint='a100&ib'"),
        ({"reservation": "school"}, "#SBATCH --reservation=school"),
        ({"exclude": "n[1-3]"}, "#SBATCH --exclude='n[1-3]'"),
        ({"walltime": "1-00:00:00"}, "#SBATCH --time=1-00:00:00"),
        ({"exclusive": True}, "#SBATCH --exclusive"),
        ({"warn_s": 120.0}, "#SBATCH --signal=USR2@120"),
        ({"sbatch": {"mail-type": "FAIL", "contiguous": True}}, "#SBATCH --mail-type=FAIL"),
        ({"sbatch": {"contiguous": True}}, "#SBATCH --contiguous"),
    ],
)
def test_each_option_of_the_cluster_is_a_line(cluster: dict[str, object], line: str) -> None:
    assert line in script(request(), **cluster).splitlines()


@pytest.mark.parametrize(
    ("form", "kind", "line"),
    [
        ("gres", None, "#SBATCH --gres=gpu:2"),
        ("gres", "a100", "#SBATCH --gres=gpu:a100:2"),
        ("gpus_per_node", None, "#SBATCH --gpus-per-node=2"),
        ("gpus_per_node", "a100", "#SBATCH --gpus-per-node=a100:2"),
    ],
)
def test_gpus_are_requested_in_the_form_of_the_site(form: str, kind: str | None, line: str) -> None:
    assert line in script(request(gpus=2, gpu_type=kind), gpu_request=form).splitlines()


def test_sizes_are_per_replica() -> None:
    lines = script(request(cpus=6, memory_gb=10.5, nodes=2)).splitlines()
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=6"):
        assert line in lines
    assert "#SBATCH --mem=10752M" in lines
    assert not any("gres" in line for line in lines)


def test_options_that_are_not_set_are_left_to_the_site() -> None:
    assert not any(word in script(request()) for word in ("--partition", "--time", "--mem", "--gres", "--account"))


def test_an_expert_overrules_the_cluster_and_adds_to_its_options() -> None:
    cluster = ClusterConfig(partition="gpu", qos="low", sbatch={"contiguous": True, "mail-type": "FAIL"})
    resources = ResourceConfig(partition="h100", exclusive=False, sbatch={"contiguous": None, "nodelist": "n7"})
    options = effective_options(cluster, resources)
    assert (options.partition, options.qos, options.exclusive) == ("h100", "low", False)
    (job,) = batch_jobs(RUN, Deployment(cluster=cluster), [JobRequest("math-0.g1", ("/bin/true",), resources)])
    assert job.options()["nodelist"] == "n7"
    assert "contiguous" not in job.options()


def test_a_job_is_never_requeued_by_slurm() -> None:
    """A requeued job waits for minutes. A new job starts sooner, and submitit does not count its timeouts."""
    assert "#SBATCH --no-requeue" in script(request()).splitlines()


def test_srun_gets_the_number_of_cpus() -> None:
    """Since Slurm 22.05, srun does not take it from sbatch; the service would run on one core."""
    step = next(line for line in script(request(cpus=6)).split("\n\n") if "srun" in line)
    assert "--cpus-per-task=6" in step
    assert "SRUN_CPUS_PER_TASK" in Path("hpc_router/cluster/launchers/slurm/batch.sh").read_text()


def test_replicas_of_one_shape_share_a_job_up_to_the_given_number() -> None:
    asked = [request(f"math-{n}.g1", gpus=1) for n in range(3)] + [request("law-0.g1", gpus=2)]
    made = jobs(request("router-0.g1"), *asked, replicas_per_job=2)
    shapes = [job.replicas for job in made]
    assert shapes == [("router-0.g1",), ("math-0.g1", "math-1.g1"), ("math-2.g1",), ("law-0.g1",)]
    shared = made[1]
    assert shared.options()["gres"] == "gpu:2"
    assert shared.options()["ntasks-per-node"] == 2
    assert shared.script().count("--exact") == 2
    assert shared.script().count("--gres=gpu:1") == 2


def test_ranks_over_several_nodes_have_a_job_of_their_own() -> None:
    made = jobs(request("big-0.g1", nodes=2), request("big-1.g1", nodes=2), replicas_per_job=4)
    assert [job.replicas for job in made] == [("big-0.g1",), ("big-1.g1",)]


def test_a_step_inside_an_allocation_names_it_and_has_no_header() -> None:
    (job,) = jobs(request(memory_gb=4))
    text = replace(job, jobid="17").script()
    assert "#SBATCH" not in text
    for word in ("--jobid=17", "--exact", "--mem=4096M", "--gres=none"):
        assert word in text


def test_paths_may_hold_spaces_and_percent_signs() -> None:
    (job,) = batch_jobs(RunDir(Path("/runs/my run 100%")), Deployment(), [request()])
    assert "#SBATCH --output='/runs/my run 100%%/jobs/math-0.g1/%j_batch.log'" in job.script().splitlines()
    assert "#SBATCH --chdir='/runs/my run 100%'" in job.script().splitlines()  # it is no pattern


@pytest.mark.parametrize(
    ("after", "own", "dependency"),
    [
        (None, None, None),
        ("17", None, "afterany:17"),
        (None, "singleton", "singleton"),
        ("17", "singleton", "afterany:17,singleton"),
        ("17", False, "afterany:17"),
    ],
)
def test_a_successor_waits_for_its_predecessor_and_for_the_sites_dependency(
    after: str | None, own: object, dependency: str | None
) -> None:
    """Without the first dependency, each router's successor would start at once and get a successor of its own."""
    asked = replace(request("router-0.g2", sbatch={"dependency": own}), after=after)
    assert jobs(asked)[0].options().get("dependency") == dependency


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ("afterok:17", None),
        ("afterok:17:18,afterany:19", None),
        ("after:17+5,aftercorr:18", None),
        ("singleton", "singleton"),
        ("afterok:17,singleton", "singleton"),
        (False, None),
    ],
)
def test_a_dependency_that_was_met_is_left_out(own: object, left: str | None) -> None:
    """Slurm 24.11 and later refuse a dependency on a job that they have forgotten. Parts that apply to every job
    stay."""
    asked = replace(request(sbatch={"dependency": own}), dependency_met=True)
    assert jobs(asked)[0].options().get("dependency") == left
    successor = replace(request("router-0.g2", sbatch={"dependency": own}), after="20", dependency_met=True)
    assert jobs(successor)[0].options()["dependency"] == f"afterany:20{f',{left}' if left else ''}"


def run_script(
    tmp_path: Path,
    *requests: JobRequest,
    srun: str = 'shift $(($# - 5)); exec "$@"',
    before: Callable[[RunDir], object] = lambda _: None,
    environment: Mapping[str, str] = {},
    **cluster: object,
) -> int:
    """Runs the script with a stand-in for srun on the PATH, and returns its exit status. `before` prepares the run
    directory."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(f"#!/bin/bash\n{srun}\n")
    (tools / "srun").chmod(0o755)
    run = RunDir(tmp_path / "run")
    for each in requests:
        (run.jobs / each.replica).mkdir(parents=True)
    run.config.touch()
    before(run)
    deployment = Deployment(cluster=ClusterConfig(kind="slurm", **cluster))  # type: ignore[arg-type]
    (job,) = batch_jobs(run, deployment, requests)
    text = replace(job, command=("/bin/true", "2", "3", "4", "5")).script()
    path = tmp_path / "job.sh"
    path.write_text(text)
    told = {"PATH": f"{tools}:/usr/bin:/bin", **environment}
    return subprocess.run(["/bin/bash", str(path)], env=told, check=False, capture_output=True).returncode


def ended(tmp_path: Path, replica: str = "math-0.g1") -> dict[str, object]:
    value = json.loads((tmp_path / "run" / "jobs" / replica / "ended.json").read_text())
    assert isinstance(value, dict)
    return value


def test_a_step_that_ends_leaves_its_status(tmp_path: Path) -> None:
    assert run_script(tmp_path, request(), srun="exit 7") == 7
    assert ended(tmp_path)["status"] == 7
    assert ended(tmp_path)["message"] is None


def test_each_of_several_steps_leaves_its_own(tmp_path: Path) -> None:
    requests = [request("math-0.g1"), request("math-1.g1")]
    srun = "[[ $HPC_ROUTER_REPLICA == math-0.g1 ]] || exit 3"
    assert run_script(tmp_path, *requests, srun=srun, replicas_per_job=2) == 3
    assert ended(tmp_path, "math-0.g1")["status"] == 0
    assert ended(tmp_path, "math-1.g1")["status"] == 3


@pytest.mark.parametrize("line", ["false", "no_such_program", 'cd "/no/such \\ folder" # with a comment', "exit 4"])
def test_a_setup_line_that_fails_ends_the_job_and_is_named(tmp_path: Path, line: str) -> None:
    assert run_script(tmp_path, request(), setup=["true", line]) != 0
    record = ended(tmp_path)
    assert record["status"] != 0
    if not line.startswith("exit"):
        assert str(record["message"]).startswith("cluster.setup[1] failed on ")


def test_setup_lines_and_environment_reach_the_steps(tmp_path: Path) -> None:
    srun = '[[ $GREETING == "hello there" && $FROM_SETUP == yes ]]'
    status = run_script(
        tmp_path, request(), srun=srun, env={"GREETING": "hello there"}, setup=["export FROM_SETUP=yes"]
    )
    assert status == 0


def test_sigterm_to_the_script_does_not_lose_the_record(tmp_path: Path) -> None:
    """Slurm signals the batch script together with its steps."""
    status = run_script(tmp_path, request(), srun='kill -TERM "$PPID" "$(ps -o ppid= -p "$PPID")"; exit 5')
    assert status == 5
    assert ended(tmp_path)["status"] == 5


def test_the_steps_own_records_count_before_bash(tmp_path: Path) -> None:
    """When a signal arrives as a step ends, `wait` of bash 5.2 returned 0 for 7 of 900 failed steps."""
    setup = ['wait() { builtin wait "$@"; return 0; }']
    assert run_script(tmp_path, *PAIR, srun="exit 3", replicas_per_job=2, setup=setup) == 3


PAIR = (request("math-0.g1"), request("math-1.g1"))
OPTIONS = (
    "set -eu",
    "set -o pipefail",
    "set -o posix",
    "trap 'true' EXIT",
    "trap - EXIT",
    "trap '' TERM",
    "set -E; trap 'exit 9' ERR",
)


@pytest.mark.parametrize("line", OPTIONS)
def test_options_and_traps_of_a_setup_line_are_its_own(tmp_path: Path, line: str) -> None:
    srun = 'kill -TERM "$PPID" "$(ps -o ppid= -p "$PPID")"; [[ $HPC_ROUTER_REPLICA == math-0.g1 ]] || exit 3'
    assert run_script(tmp_path, *PAIR, srun=srun, replicas_per_job=2, setup=[line, "true"]) == 3
    assert ended(tmp_path, "math-0.g1")["status"] == 0
    assert ended(tmp_path, "math-1.g1")["status"] == 3


@pytest.mark.parametrize("line", OPTIONS)
def test_a_line_that_fails_is_named_whatever_it_set(tmp_path: Path, line: str) -> None:
    assert run_script(tmp_path, request(), setup=[line, f"{line}; true && false"]) == 1
    assert str(ended(tmp_path)["message"]).startswith("cluster.setup[1] failed on ")


@pytest.mark.parametrize(
    "line",
    [
        "bash -c 'kill -TERM $PPID; kill -TERM $$'",
        "bash -c 'kill -TERM $PPID'",
        "bash -c 'kill -TERM $PPID' || exit 4",
        "bash -c 'kill -TERM $PPID; exit 4'",
        "set -eu; trap 'true' EXIT; bash -c 'kill -TERM $PPID; exit 4'",
    ],
)
def test_sigterm_during_setup_is_no_fault_of_the_setup(tmp_path: Path, line: str) -> None:
    """Preemption and scancel also end a setup line. The record must not be permanent, because another job could
    start."""
    began = tmp_path / "began"
    status = run_script(tmp_path, request(), setup=[line, f"touch {began}"], srun=f"touch {began}")
    assert status in (143, 4)
    assert (ended(tmp_path)["status"], ended(tmp_path)["message"]) == (143, None)
    assert not began.exists()


@pytest.mark.parametrize(
    ("pause", "status", "message"),
    [("kill -TERM $$", 143, None), (":", 1, "cluster.setup[1] failed on ")],
)
def test_a_child_may_get_sigterm_first(tmp_path: Path, pause: str, status: int, message: str | None) -> None:
    """Slurm signals one process after the other. A line that always ends with this status must not be retried for
    ever."""
    setup = [f"sleep() {{ {pause}; }}", "bash -c 'kill -TERM $$'"]
    assert run_script(tmp_path, request(), setup=setup) == status
    record = ended(tmp_path)
    assert record["status"] == status
    assert (str(record["message"]).startswith(message)) if message else (record["message"] is None)


def test_a_job_on_a_node_that_does_not_see_the_run_directory_ends_at_once(tmp_path: Path) -> None:
    """Slurm 24.11 and later create the missing folders of the job's log there, so that the job starts. It must leave
    no record, which nobody could read."""
    began, no_pause = tmp_path / "began", tmp_path / "no-pause"
    no_pause.write_text("sleep() { :; }\n")
    status = run_script(
        tmp_path,
        request(),
        setup=[f"touch {began}"],
        before=lambda run: run.config.unlink(),
        environment={"BASH_ENV": str(no_pause)},
    )
    assert status == 1
    assert not began.exists()
    assert not (tmp_path / "run" / "jobs" / "math-0.g1" / "ended.json").exists()


def job_of(job_id: str) -> JobInfo:
    return JobInfo(job_id=job_id, host="login", argv=('"job_id": "99",',), runner=Runner.SLURM)


EXIT = Exit(ok=False, reason=FailureReason.UNANSWERED, message="sbatch timed out")


@pytest.mark.parametrize("record", [EXIT, Ended(0, 1.0), job_of("16")])
@pytest.mark.parametrize("replicas", [("math-0.g1",), ("math-0.g1", "math-1.g1")])
def test_a_job_whose_replicas_have_ended_ends_at_once(
    tmp_path: Path, record: Exit | Ended | JobInfo, replicas: tuple[str, ...]
) -> None:
    """sbatch may time out although the job was submitted; by the time it starts, another generation exists."""
    found: list[dict[Path, bytes]] = []

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def before(run: RunDir) -> None:
        for replica in replicas:
            JobDir(run, replica).write(record)
        found.append(contents())

    began = tmp_path / "began"
    status = run_script(
        tmp_path,
        *map(request, replicas),
        before=before,
        srun=f"touch {began}",
        setup=[f"touch {began}"],
        replicas_per_job=2,
        environment={"SLURM_JOB_ID": "17"},
    )
    assert status == 0
    assert found == [contents()]
    assert not began.exists()


@pytest.mark.parametrize("environment", [{"SLURM_JOB_ID": "17"}, {}])
def test_a_job_that_is_waited_for_begins(tmp_path: Path, environment: dict[str, str]) -> None:
    """Its `job.json` appears a moment after sbatch has returned. A step of an allocation has no $SLURM_JOB_ID."""
    job_id = environment.get("SLURM_JOB_ID", "16")
    for number, infos in enumerate(([], [job_of(job_id)])):
        folder = tmp_path / str(number)
        folder.mkdir()

        def before(run: RunDir, infos: list[JobInfo] = infos) -> None:
            for info in infos:
                JobDir(run, "math-0.g1").write(info)

        assert run_script(folder, request(), before=before, environment=environment, srun="exit 5") == 5
        assert ended(folder)["status"] == 5


def test_in_a_shared_job_only_those_waited_for_begin(tmp_path: Path) -> None:
    status = run_script(
        tmp_path,
        *PAIR,
        before=lambda run: JobDir(run, "math-0.g1").write(EXIT),
        srun="[[ $HPC_ROUTER_REPLICA == math-1.g1 ]] || exit 3",
        replicas_per_job=2,
    )
    assert status == 0
    assert ended(tmp_path, "math-1.g1")["status"] == 0
    assert [path.name for path in (tmp_path / "run" / "jobs" / "math-0.g1").iterdir()] == ["exit.json"]


def test_a_full_disk_leaves_no_empty_files(tmp_path: Path) -> None:
    assert run_script(tmp_path, request(), setup=["trap '' XFSZ", "ulimit -f 0"]) == 0
    assert list((tmp_path / "run" / "jobs" / "math-0.g1").iterdir()) == []


def test_lines_of_bash_have_no_faults() -> None:
    fine = [
        "true",
        "if true; then ulimit -n 4096; fi",
        "ls !(a) # a comment",
        'echo "it\'s ü"',
        "exit 4",
        "\techo $((1))",
    ]
    assert setup_faults(fine) == []
    assert setup_faults([]) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("if true", "syntax error: unexpected end of file"),
        ("echo 'x", "unexpected EOF while looking for matching"),
        ("} || true; {", "syntax error near unexpected token `}'"),
        ("cat <<EOF", "here-document"),
        ("echo \\", "syntax error"),
        ("fi", "syntax error near unexpected token `fi'"),
    ],
)
def test_a_line_with_a_syntax_error_is_named(line: str, said: str) -> None:
    """Lines that are valid alone but would swallow the next ones are named, too."""
    (fault,) = setup_faults(["true", line])
    assert fault.startswith("cluster.setup[1]: ")
    assert said in fault
    assert "\n" not in fault


def test_checking_a_line_does_not_run_it(tmp_path: Path) -> None:
    assert setup_faults([f"touch {tmp_path}/ran", f": $(touch {tmp_path}/ran)"]) == []
    assert list(tmp_path.iterdir()) == []
