"""Error texts of real Slurm versions, and the advice that users get."""

from dataclasses import replace
from typing import Any

import pytest

from hpc_router.cluster.launchers.slurm.submit_errors import explain, find, is_temporary, one_line
from hpc_router.config.schema import ClusterConfig, Deployment, EngineConfig, ExpertConfig, ResourceConfig


def deployment(cluster: dict[str, Any] | None = None, **resources: Any) -> Deployment:
    expert = ExpertConfig(model="m", engine=EngineConfig(kind="sim"), resources=ResourceConfig(**resources))
    return replace(Deployment(experts={"math": expert}), cluster=ClusterConfig(kind="slurm", **(cluster or {})))


LIMIT = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (
            "sbatch: error: invalid partition specified: nope\nallocation failure: Invalid partition name specified",
            "partition",
        ),
        ("sbatch: error: Batch job submission failed: No partition specified or system default partition", "partition"),
        ("allocation failure: Invalid account or account/partition combination specified", "account"),
        ("sbatch: error: Please specify an account with --account", "account"),
        ("allocation failure: Invalid qos specification", "qos"),
        ("allocation failure: User's group not permitted to use this partition", "partition"),
        ("allocation failure: Requested node configuration is not available", "gpus"),
        ("sbatch: error: Invalid generic resource (gres) specification", "gpus"),
        ("allocation failure: Invalid feature specification", "constraint"),
        ("sbatch: error: Invalid --time specification", "walltime"),
        ("allocation failure: Requested time limit is invalid (missing or exceeds some limit)", "walltime"),
        ("sbatch: error: Memory specification can not be satisfied", "memory_gb"),
        ("sbatch: error: This cluster requires you to set --mem", "memory_gb"),
        ("sbatch: fatal: --mem, --mem-per-cpu, and --mem-per-gpu are mutually exclusive.", "memory_gb"),
        ("allocation failure: Memory required by task is not available", "memory_gb"),
        ("allocation failure: Requested reservation is invalid", "reservation"),
        ("allocation failure: Access denied to requested reservation", "reservation"),
        ("allocation failure: Invalid node name specified", "exclude"),
        ("allocation failure: Node count specification invalid", "nodes"),
        ('sbatch: error: Invalid numeric value "0" for --cpus-per-task.', "cpus"),
        ("allocation failure: Invalid license specification", "sbatch"),
        ("sbatch: unrecognized option '--bogus=1'\nTry \"sbatch --help\" for more information", "sbatch"),
        ("sbatch: error: Invalid --signal specification", "sbatch"),
        ("sbatch: error: Batch job submission failed: Job dependency problem", "sbatch.dependency"),
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\nallocation failure: {LIMIT}", "qos"),
        (f"sbatch: error: AssocMaxSubmitJobLimit\nallocation failure: {LIMIT}", "qos"),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\nallocation failure: {LIMIT}", "walltime"),
        (f"sbatch: error: QOSMaxCpuPerJobLimit\nallocation failure: {LIMIT}", "cpus"),
        (f"sbatch: error: QOSMaxGRESPerJob\nallocation failure: {LIMIT}", "gpus"),
        (f"sbatch: error: QOSMinGRES\nallocation failure: {LIMIT}", "gpus"),
        (f"allocation failure: {LIMIT}", "qos"),
        ("sbatch: error: Batch job submission failed: Access/permission denied", "account"),
    ],
)
def test_the_likeliest_key_comes_first(text: str, first: str) -> None:
    found = find(text)
    assert found is not None
    assert found.keys[0] == first
    assert not is_temporary(text)


@pytest.mark.parametrize(
    "text",
    [
        "allocation failure: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        "sbatch: fatal: Could not establish a configuration source",
        "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
        "sbatch: error: Batch job submission failed: Unable to create job record, try again",
        "allocation failure: Required node not available (down, drained or reserved)",
        "allocation failure: Requested partition configuration not available now",
        "allocation failure: Required partition not available (inactive or drain)",
    ],
)
def test_that_slurm_cannot_answer_is_no_value_to_edit(text: str) -> None:
    assert is_temporary(text)
    assert explain(text, deployment(), "math").startswith("Slurm cannot take it now: ")


def test_the_keys_are_those_at_which_the_values_stand() -> None:
    account = "allocation failure: Invalid account or account/partition combination specified"
    told = explain(account, deployment({"account": "a", "partition": "p"}, partition="own"), "math")
    assert told.startswith("cluster.account=a, experts.math.resources.partition=own: Slurm refuses it: Invalid account")
    assert "sacctmgr show associations" in told
    told = explain(account, deployment({"partition": "p"}), "math")
    assert told.startswith("cluster.account is not set, cluster.partition=p: Slurm refuses it")
    assert explain(account, deployment(), "router").startswith("cluster.account is not set: Slurm refuses it")


def test_sizes_are_named_if_they_are_requested() -> None:
    told = explain("Requested node configuration is not available", deployment({"qos": "q"}, gpus=8, cpus=2), "math")
    assert told.startswith(
        "experts.math.resources.gpus=8, experts.math.resources.cpus=2, experts.math.resources.nodes=1: "
    )
    assert explain("requires --mem", deployment(), "math").startswith("experts.math.resources.memory_gb is not set: ")


def test_extra_options_are_named_one_by_one() -> None:
    made = deployment({"sbatch": {"bogus": 1, "nice": 5}}, sbatch={"nice": None, "hold": True})
    told = explain("sbatch: unrecognized option '--bogus=1'", made, "math")
    assert "cluster.sbatch.bogus=1, experts.math.resources.sbatch.hold=True: Slurm refuses it" in told


def test_a_refused_dependency_is_named_alone() -> None:
    made = deployment({"sbatch": {"dependency": "afterok:17", "nice": 5}})
    told = explain("sbatch: error: Batch job submission failed: Job dependency problem", made, "math")
    assert told.startswith(
        "cluster.sbatch.dependency=afterok:17: Slurm refuses it: Job dependency problem (Slurm knows no such job"
    )
    assert "sacct --jobs=ID" in told


def test_an_unknown_error_is_quoted_with_all_requested_options() -> None:
    told = explain("sbatch: error: No lunch on Mondays\n", deployment({"partition": "p"}, gpus=2), "math")
    assert told == (
        "Slurm refuses it: No lunch on Mondays (asked for: cluster.partition=p, experts.math.resources.nodes=1, "
        "experts.math.resources.gpus=2, experts.math.resources.cpus=1)"
    )


def test_an_error_text_becomes_one_line() -> None:
    assert one_line("sbatch: error: a\nsbatch: error: Batch job submission failed: b\nsbatch: error: a\n") == "a; b"
    assert one_line("") == "no reason given"
