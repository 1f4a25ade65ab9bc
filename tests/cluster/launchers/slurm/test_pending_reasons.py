"""Explanations of every reason for which Slurm lets a job wait, and which of them mean that it will never start."""

import re

import pytest

from hpc_router.cluster.launchers.slurm.pending_reasons import explain_pending

PASSING = (
    "Resources Priority BeginTime Dependency Licenses JobHeldUser JobHeldAdmin NodeDown "
    "ReqNodeNotAvail Reservation PartitionDown PartitionInactive QOSUsageThreshold Prolog Cleaning "
    "QOSMaxJobsPerUserLimit QOSMaxCpuPerUserLimit QOSMaxGRESPerUser QOSMaxNodePerUserLimit QOSMaxMemoryPerUser "
    "QOSGrpCpuLimit QOSGrpGRES QOSGrpNodeLimit QOSGrpGRESMinutes QOSGrpJobsLimit QOSGrpSubmitJobsLimit "
    "AssocGrpCpuLimit AssocGrpGRES AssocGrpMemLimit AssocGrpCPUMinutesLimit AssocGrpBillingMinutes AssocMaxJobsLimit "
    "AssocMaxSubmitJobLimit MaxJobsPerAccount MaxCpuPerAccount MaxGRESPerAccount MaxNodePerAccount "
    "QOSMaxSubmitJobPerUserLimit AssociationJobLimit QOSJobLimit"
)
HOPELESS = (
    "BadConstraints PartitionTimeLimit PartitionNodeLimit PartitionConfig InvalidAccount InvalidQOS AccountNotAllowed "
    "QOSNotAllowed ReservationDeleted DependencyNeverSatisfied MaxMemPerLimit JobHoldMaxRequeue "
    "QOSMaxCpuPerJobLimit QOSMaxGRESPerJob QOSMaxGRESPerNode QOSMaxNodePerJobLimit QOSMaxMemoryPerJob "
    "QOSMaxWallDurationPerJobLimit QOSMaxCpuMinutesPerJobLimit QOSMinGRES QOSMinMemory QOSMinCpuNotSatisfied "
    "AssocMaxCpuPerJobLimit AssocMaxGRESPerJob AssocMaxNodePerJobLimit AssocMaxWallDurationPerJobLimit "
    "AssocMaxMemPerNode AssocMaxCpuPerNode AssocMaxGRESMinutesPerJob"
)


@pytest.mark.parametrize("reason", f"{PASSING} {HOPELESS}".split())
def test_known_reasons(reason: str) -> None:
    waiting = explain_pending(reason)
    assert "Slurm says" not in waiting.what
    assert not re.search(r"Per(Job|User|Node)|Grp|GRES", waiting.what), "in words"
    assert waiting.hopeless is (reason in HOPELESS.split())
    assert waiting.advice is not None or not waiting.hopeless


def test_a_limit_names_its_owner_and_resource() -> None:
    assert (
        explain_pending("QOSMaxGRESPerUser").what
        == "its qos is at its limit of GPUs for one user: it starts when others end"
    )
    assert explain_pending("AssocGrpCpuLimit").what.startswith(
        "its account is at its limit of CPUs for all jobs together"
    )
    assert explain_pending("QOSMaxWallDurationPerJobLimit").what == "it asks for more time than its qos allows a job"
    assert "cluster.walltime or cluster.qos" in (explain_pending("QOSMaxWallDurationPerJobLimit").advice or "")
    assert explain_pending("QOSMinGRES").what == "its qos wants jobs with more GPUs"
    assert "GPU time in a period" in explain_pending("AssocGrpGRESMinutes").what


@pytest.mark.parametrize(
    ("reason", "what"),
    [
        ("(Resources)", "it is next in line and waits for nodes to become free"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-3]", "(n[1-3])"),
        ("(ReqNodeNotAvail, May be reserved for other job)", "a job that would run into one waits"),
        ("ReqNodeNotAvail, UnavailableNodes:", "a job that would run into one waits"),
        (
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
            "of higher priority",
        ),
        ("launch failed requeued held", "a node could not start it"),
        ("launch_failed_requeued_held", "a node could not start it"),
        ("SomethingNew", "Slurm says: SomethingNew"),
        ("", "Slurm says: nothing"),
    ],
)
def test_the_forms_squeue_writes(reason: str, what: str) -> None:
    assert what in explain_pending(reason).what


def test_the_job_is_named_in_the_advice() -> None:
    assert explain_pending("JobHeldUser", "7").advice == "`scontrol release 7` releases it"
    assert explain_pending("JobHeldUser").advice == "`scontrol release JOBID` releases it"
    assert "scancel 7_1" in (explain_pending("launch failed requeued held", "7_1").advice or "")
    assert explain_pending("Resources", "7").advice is None
    told = explain_pending("ReqNodeNotAvail, UnavailableNodes:n1", "7")
    assert "(n1)" in told.what
    assert told.advice == (explain_pending("ReqNodeNotAvail").advice or "").replace("JOBID", "7")


def test_an_unknown_reason_is_not_hopeless() -> None:
    assert explain_pending("SomethingNew").hopeless is False
