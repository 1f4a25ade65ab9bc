"""The scripts of sbatch/, submitted as a user submits them: they make a deployment that answers, drains and ends."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from hpc_router.net.http_client import Unreachable, call_blocking
from hpc_router.routing.artefact import read
from hpc_router.routing.classifier import Classifier
from hpc_router.state.job_records import FailureReason, JobDir
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State
from hpc_router.state.run_directory import RunDir
from tests.routing.training.samples import prompts, write_jsonl
from tests.slurm.cluster import SlurmCluster
from tests.support.needs import ROOT
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm


@dataclass
class ByHand:
    """A run directory, whose name needs quoting in a shell, and the jobs submitted for it."""

    cluster: SlurmCluster
    run: RunDir
    jobs: list[str] = field(default_factory=list)

    def submit(self, script: str, *words: str, options: tuple[str, ...] = ()) -> str:
        number = self.cluster.run(
            ["sbatch", "--parsable", f"--output={self.cluster.shared}/%x-%j.log", *options, f"sbatch/{script}", *words],
            folder=ROOT,
        ).strip()
        self.jobs.append(number)
        return number

    def job(self, number: str) -> dict[str, str]:
        words = self.cluster.run(["scontrol", "--oneliner", "show", "job", number]).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def ended(self, number: str) -> dict[str, str]:
        """The job, once Slurm has ended it."""
        over = ("COMPLETED", "FAILED", "CANCELLED")
        eventually_sync(lambda: self.job(number)["JobState"] in over, every_s=0.2)
        return self.job(number)

    def job_output(self, number: str) -> str:
        (log,) = self.cluster.shared.glob(f"*-{number}.log")
        return log.read_text()

    def record(self, kind: RecordKind, expert: str = "") -> Record | None:
        """The record of the endpoint that is ready."""
        for known in RegistryReader(self.run.registry).snapshot().values():
            if known.kind is kind and known.state is State.READY and (not expert or expert in known.serves):
                return known
        return None

    def router(self) -> str:
        found = eventually_sync(lambda: self.record(RecordKind.ROUTER))
        return found.url

    def has_ready(self, *experts: str) -> None:
        url = self.router()

        def ready() -> bool:
            try:
                return set(experts) <= set(call_blocking("GET", f"{url}/ready").body["ready"])
            except Unreachable:
                return False

        eventually_sync(ready, every_s=0.1)

    def answered_by(self, model: str, prompt: str = "Hello") -> str:
        """The `x-expert` header of an answer to this machine, which is not a node."""
        with openai.OpenAI(base_url=f"{self.router()}/v1", api_key=self.run.token(), max_retries=0) as client:
            answer = client.chat.completions.with_raw_response.create(
                model=model, messages=[{"role": "user", "content": prompt}], max_tokens=4
            )
        return str(answer.headers["x-expert"])

    def replica(self, number: str) -> JobDir:
        """The job folder of the replica that this job runs."""
        for folder in self.run.jobs.iterdir():
            job = JobDir(self.run, folder.name)
            info = job.info()
            if info is not None and info.job_id == number:
                return job
        raise AssertionError(f"job {number} carries no replica")


@pytest.fixture(scope="module")
def by_hand(cluster: SlurmCluster) -> Iterator[ByHand]:
    """A router and the expert for code on n1, and the expert for maths on c1; n2 and n3 are idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_ROUTER_PYTHON", sys.executable)
        patch.delenv("HPC_ROUTER_HOME", raising=False)
        made = ByHand(cluster, RunDir(cluster.shared / "run 'by' hand"))
        run = str(made.run.path)
        made.submit("router.sbatch", run, "topology=sim", options=("--nodelist=c1",))
        try:
            eventually_sync(made.run.registry.is_dir)
            for name, node in (("code", "n1"), ("math", "c1")):
                made.submit("expert.sbatch", run, name, "topology=sim", options=(f"--nodelist={node}",))
            yield made
        finally:
            cluster.run(["scancel", *made.jobs])
            cluster.wait_idle()


@pytest.mark.parametrize("script", ["expert", "expert-multinode", "router", "bench"])
def test_bad_arguments_are_refused_with_the_usage(script: str, tmp_path: Path) -> None:
    """Exit status 2, and nothing is created. The test needs only a shell, no Slurm."""
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}
    nowhere, name = str(tmp_path / "nowhere"), [] if script in ("router", "bench") else ["math"]

    def refusal(*words: str, **more: str) -> str:
        done = subprocess.run(
            ["bash", f"sbatch/{script}.sbatch", *words],
            cwd=ROOT, env={**environment, **more}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done
        assert f"sbatch/{script}.sbatch RUN" in done.stderr
        return done.stderr

    assert "missing" in refusal()
    assert "no name" in refusal("", *name)
    assert "no clone" in refusal(nowhere, *name, HPC_ROUTER_HOME=str(tmp_path))
    assert "no such program" in refusal(str(tmp_path), *name, HPC_ROUTER_PYTHON="/no/python")
    assert "submit it with sbatch" in refusal(str(tmp_path), *name, SLURM_JOB_ID="")
    if script != "router":
        assert f"no run directory {nowhere}" in refusal(nowhere, *name)
    if script == "expert-multinode":
        assert "use sbatch/expert.sbatch" in refusal(str(tmp_path), *name, SLURM_NNODES="1")
    assert list(tmp_path.iterdir()) == []


def test_what_slurm_shows_of_a_refused_job(by_hand: ByHand) -> None:
    """Also if the program itself refuses."""
    absent = by_hand.submit("expert.sbatch", str(by_hand.cluster.shared / "nowhere"), "math")
    unknown = by_hand.submit("expert.sbatch", str(by_hand.run.path), "maths", "topology=sim")
    assert by_hand.ended(absent)["ExitCode"] == by_hand.ended(unknown)["ExitCode"] == "2:0"
    assert "usage: sbatch" in by_hand.job_output(absent)
    assert "did you mean 'math'" in by_hand.job_output(unknown)


def test_each_expert_answers_through_the_router(by_hand: ByHand) -> None:
    by_hand.has_ready("code", "math")
    records = {name: by_hand.record(RecordKind.EXPERT, name) for name in ("code", "math")}
    assert {name: record.node for name, record in records.items() if record} == {"code": "n1", "math": "c1"}
    step = by_hand.cluster.run(["scontrol", "--oneliner", "show", "step", f"{by_hand.jobs[1]}.0"])
    assert "CPUs=4 " in step, "what the job has, srun must be told"
    assert by_hand.answered_by("auto", "Write a Python function that reverses a list.") == "code"
    assert by_hand.answered_by("auto", "Solve the equation x^2 - 4 = 0 for x.") == "math"


def test_a_bench_measures_from_a_node(by_hand: ByHand) -> None:
    by_hand.has_ready("code", "math")
    words = ("bench=smoke", "bench.model=math", "bench.users=[2]", "bench.requests=6", "bench.max_tokens=4")
    number = by_hand.submit("bench.sbatch", str(by_hand.run.path), *words, options=("--nodelist=n1",))
    assert by_hand.ended(number)["ExitCode"] == "0:0", by_hand.job_output(number)
    (path,) = (by_hand.run.path / "bench").glob("*.jsonl")
    found: dict[str, Any] = json.loads(path.read_text())
    assert (found["users"], found["succeeded"], found["experts"]) == (2, 6, {"math": 1.0})
    origin = found["provenance"]
    assert (origin["job_id"], origin["hardware"]["host"]) == (number, "n1")
    assert str(path) in by_hand.job_output(number)


def test_a_training_makes_an_artefact(by_hand: ByHand) -> None:
    """File names need quoting in a shell. The job's log names a bad row."""
    pytest.importorskip("sklearn", reason="features=lexical needs scikit-learn")
    folder = by_hand.cluster.shared / "it's trained"
    folder.mkdir()
    data, output = write_jsonl(folder / "the prompts.jsonl", prompts()), folder / "the artefact"
    words = (str(data), str(output), "features=lexical")
    number = by_hand.submit("train.sbatch", *words, "method=exemplars", options=("--nodelist=n1",))
    refused = by_hand.submit("train.sbatch", *words, "clusters=1", options=("--nodelist=c1",))
    assert by_hand.ended(number)["ExitCode"] == "0:0", by_hand.job_output(number)
    assert Classifier(read(output)).classify("a comet near the moon").expert == "astronomy"
    assert str(output) in by_hand.job_output(number)
    assert by_hand.ended(refused)["ExitCode"] == "2:0"
    assert "a classifier needs 2 or more" in by_hand.job_output(refused)


def test_a_training_without_data_or_output_is_refused() -> None:
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "sbatch/train.sbatch", "prompts.jsonl"], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "DATA and OUTPUT are needed" in done.stderr
    assert "sbatch/train.sbatch DATA OUTPUT" in done.stderr


def test_an_expert_over_two_nodes_is_one_endpoint(by_hand: ByHand) -> None:
    """Each of two whole nodes runs a task. The router sees one replica, which answers."""
    number = by_hand.submit(
        "expert-multinode.sbatch", str(by_hand.run.path), "law", "topology=sim", options=("--nodelist=n[2-3]",)
    )
    by_hand.has_ready("law")
    assert by_hand.answered_by("law") == "law"
    assert len([r for r in RegistryReader(by_hand.run.registry).snapshot().values() if "law" in r.serves]) == 1
    assert by_hand.cluster.states()["n2"] == by_hand.cluster.states()["n3"] == "allocated"
    by_hand.cluster.run(["scancel", number])
    by_hand.ended(number)
    eventually_sync(lambda: by_hand.record(RecordKind.EXPERT, "law") is None)


def test_a_killed_service_leaves_the_script_s_record(by_hand: ByHand) -> None:
    """After SIGKILL only the script's trap can write a record."""
    number = by_hand.submit(
        "expert.sbatch", str(by_hand.run.path), "medicine", "topology=sim", options=("--nodelist=n1",)
    )
    eventually_sync(lambda: by_hand.record(RecordKind.EXPERT, "medicine"))
    job = by_hand.replica(number)
    process = job.process()
    assert process is not None
    by_hand.cluster.node("n1").enter(["kill", "-KILL", str(process.pid)])
    by_hand.ended(number)
    ended = job.ended()
    assert ended is not None
    assert ended.status == 128 + 9


def test_scancel_drains_and_leaves_nothing(by_hand: ByHand) -> None:
    """SIGTERM drains, and so does SIGUSR2, which Slurm sends to the steps before the walltime ends; the script survives
    it."""
    by_hand.has_ready("code", "math")
    router, code, math = by_hand.jobs[:3]
    carried = {number: by_hand.replica(number) for number in (router, code, math)}
    names = (by_hand.run.path.name, by_hand.run.path.name.replace("'", "\\'"))  # as in an argument for Hydra
    assert len(with_word(*names)) >= len(carried)
    by_hand.cluster.run(["scancel", "--signal=USR2", code])
    assert by_hand.ended(code)["JobState"] == "COMPLETED"
    by_hand.cluster.run(["scancel", router, math])
    for number, job in carried.items():
        by_hand.ended(number)
        exit_record, ended = eventually_sync(job.exit), eventually_sync(job.ended)
        assert (exit_record.ok, exit_record.reason, ended.status) == (True, FailureReason.DRAINED, 0), job.replica
    assert not {job.replica for job in carried.values()} & set(RegistryReader(by_hand.run.registry).snapshot())
    eventually_sync(lambda: not with_word(*names))
