"""Explains Slurm's reason for a waiting job, and what to do about it. Pure.

Slurm updates the reason whenever it considers the job; few reasons mean that the job can never start.
"""

import re
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class PendingReason:
    """The explanation of why a job waits in Slurm's queue. `hopeless`: whether the job will never start with its
    present options."""

    what: str
    advice: str | None = None
    hopeless: bool = False


_EDIT: Final = "change {} with `hpc-router apply`"
_LIMIT: Final = "`sacctmgr show qos` and `scontrol show assoc_mgr` show the limits"
_JOB: Final = "JOBID"
"""Placeholder for the job's id. It stays if the id is not known."""
_HELD: Final = "`scontrol release JOBID` releases it"
_SHORTER: Final = "`scontrol update JobId=JOBID TimeLimit=H:MM:SS`, or cluster.walltime by `hpc-router apply`"
_MOVE: Final = (
    "`scontrol update JobId=JOBID Partition=NAME` moves it; for all jobs, cluster.partition by `hpc-router apply`"
)

STEP_RESOURCES: Final = "StepResources"
"""The reason of a step that does not start. Slurm has no word for it."""

_REASONS: Final[dict[str, PendingReason]] = {
    STEP_RESOURCES: PendingReason(
        "its step waits for resources that other steps of the job hold", "`squeue --steps --jobs=JOBID` shows them"
    ),
    "Resources": PendingReason("it is next in line and waits for nodes to become free"),
    "Priority": PendingReason(
        "jobs of higher priority go first", f"a shorter time lets it fill gaps sooner: {_SHORTER}"
    ),
    "BeginTime": PendingReason("its time to begin has not come, or it was requeued and waits two minutes"),
    "Dependency": PendingReason(
        "it waits for another job: a standby router for the serving router, other jobs as sbatch.dependency says",
        "`scontrol show job JOBID` names that job",
    ),
    "DependencyNeverSatisfied": PendingReason(
        "it waits for a job that cannot end as its dependency asks",
        _EDIT.format("dependency in cluster.sbatch or resources.sbatch"),
        True,
    ),
    "Licenses": PendingReason("it waits for a license", "`scontrol show licenses` shows which are in use"),
    "JobHeldUser": PendingReason("it is held by its owner", _HELD),
    "JobHeldAdmin": PendingReason("it is held by an administrator", "ask the site's support why"),
    "JobHoldMaxRequeue": PendingReason(
        "it was requeued too often and is held", "`scancel JOBID` and a fresh job replaces it", True
    ),
    "launch_failed_requeued_held": PendingReason(
        "a node could not start it, so Slurm holds it", "`scancel JOBID` and a fresh job replaces it", True
    ),
    "NodeDown": PendingReason("a node it needs is down", "it starts when the node is back"),
    "ReqNodeNotAvail": PendingReason(
        "nodes it needs are down, drained or reserved, often for maintenance: a job that would run into one waits",
        f"a shorter time may fit in: {_SHORTER}; `scontrol show reservation` and `sinfo --list-reasons` show more",
    ),
    "Nodes required for job are DOWN": PendingReason(
        "nodes it needs are down, drained or reserved for jobs of higher priority", "`sinfo --list-reasons` shows more"
    ),
    "Reservation": PendingReason("its reservation has not begun or is full", "`scontrol show reservation` shows when"),
    "ReservationDeleted": PendingReason("its reservation is gone", _EDIT.format("cluster.reservation"), True),
    "PartitionDown": PendingReason("its partition is closed", f"`sinfo` shows more and which are open; {_MOVE}"),
    "PartitionInactive": PendingReason("its partition takes no jobs now", _MOVE),
    "PartitionTimeLimit": PendingReason(
        "it asks for more time than its partition allows", _EDIT.format("cluster.walltime or cluster.partition"), True
    ),
    "PartitionNodeLimit": PendingReason(
        "it asks for more or fewer nodes than its partition allows, or needs nodes that are down",
        _EDIT.format("resources.nodes or cluster.partition"),
        True,
    ),
    "PartitionConfig": PendingReason(
        "its partition does not allow what it asks for", _EDIT.format("cluster.partition or resources"), True
    ),
    "BadConstraints": PendingReason(
        "no node has what it asks for", _EDIT.format("cluster.constraint, cluster.partition or resources"), True
    ),
    "InvalidAccount": PendingReason("its account is not valid", _EDIT.format("cluster.account"), True),
    "AccountNotAllowed": PendingReason(
        "its account may not use the partition", _EDIT.format("cluster.account or cluster.partition"), True
    ),
    "InvalidQOS": PendingReason("its qos is not valid", _EDIT.format("cluster.qos"), True),
    "QOSNotAllowed": PendingReason("its account or partition may not use the qos", _EDIT.format("cluster.qos"), True),
    "QOSUsageThreshold": PendingReason(
        "its account has used up what the qos grants", "`hpc-router apply` sets another cluster.qos or cluster.account"
    ),
    "MaxMemPerLimit": PendingReason(
        "it asks for more memory than the site allows", _EDIT.format("resources.memory_gb"), True
    ),
    "Prolog": PendingReason("its nodes are being prepared"),
    "Cleaning": PendingReason("its last run is still being cleaned up"),
    "DeadLine": PendingReason("its deadline cannot be kept", _EDIT.format("resources.sbatch.deadline"), True),
    "JobLaunchFailure": PendingReason("a node could not start it", "`scancel JOBID` and a fresh job replaces it"),
    "RequiresReservation": PendingReason(
        "its partition is for jobs with a reservation only", _EDIT.format("cluster.reservation"), True
    ),
    "BurstBufferResources": PendingReason("it waits for room in a burst buffer"),
    "BurstBufferStageIn": PendingReason("its data are copied to a burst buffer"),
    "AssociationTimeLimit": PendingReason("its account allows less time", _EDIT.format("cluster.walltime"), True),
    "AssociationResourceLimit": PendingReason("its account is at a limit", _LIMIT),
    "AssociationJobLimit": PendingReason("its account already runs the maximum number of jobs", _LIMIT),
    "QOSTimeLimit": PendingReason("its qos allows less time", _EDIT.format("cluster.walltime or cluster.qos"), True),
    "QOSResourceLimit": PendingReason("its qos is at a limit", _LIMIT),
    "QOSJobLimit": PendingReason("its qos already runs the maximum number of jobs", _LIMIT),
}
_OWNERS: Final = {
    "QOS": ("qos", "cluster.qos"),
    "Assoc": ("account", "cluster.account"),
    "": ("account", "cluster.account"),
}
_LIMITS: Final = re.compile(r"(?P<of>QOS|Assoc|)(?P<kind>Grp|Max|Min)(?P<what>[A-Z][A-Za-z]*)")
_ONE_JOB: Final = re.compile(r"Per(Job|Node)(Limit)?$|Wall|CpuPerNode")
"""Matches limits of a single job. For these, it does not help that other jobs end."""
_RESOURCES: Final = (
    ("Wall", "time", "cluster.walltime"),
    ("Minutes", "CPU or GPU time in a period", "cluster.walltime"),
    ("Submit", "jobs in the queue", "replicas"),
    ("Jobs", "running jobs", "replicas"),
    ("Cpu", "CPUs", "resources.cpus"),
    ("GRES", "GPUs", "resources.gpus"),
    ("Mem", "memory", "resources.memory_gb"),
    ("Node", "nodes", "resources.nodes"),
)


def explain_pending(reason: str, job_id: str | None = None) -> PendingReason:
    """Returns the explanation of `reason`, squeue's text for why a job waits. An unknown reason is quoted. `job_id` is
    inserted into the advice."""
    text = reason.strip().strip("()")
    word, _, detail = text.partition(",")
    word = "launch_failed_requeued_held" if word.replace(" ", "_") == "launch_failed_requeued_held" else word.strip()
    known = _REASONS.get(word) or _limit(word) or PendingReason(f"Slurm says: {text or 'nothing'}")
    named = re.search(r"UnavailableNodes:(\S+)", detail)
    what = f"{known.what} ({named[1]})" if named else known.what
    advice = known.advice.replace(_JOB, job_id) if known.advice and job_id else known.advice
    return replace(known, what=what, advice=advice)


def _limit(word: str) -> PendingReason | None:
    """Returns the explanation of a reason that is the name of a limit, such as `QOSMaxGRESPerUser`, `AssocGrpCpuLimit`
    or `MaxNodePerAccount`, from the parts of the name. Returns None if `word` names no limit."""
    match = _LIMITS.fullmatch(word)
    if match is None:
        return None
    whose, key = _OWNERS[match["of"]]
    what, edit = next(
        ((w, k) for part, w, k in _RESOURCES if part.lower() in match["what"].lower()), ("a resource", "resources")
    )
    if match["kind"] == "Min":
        return PendingReason(
            f"its {whose} wants jobs with more {what}", _EDIT.format(f"{edit} or {key}"), hopeless=True
        )
    if match["kind"] == "Max" and _ONE_JOB.search(match["what"]):
        return PendingReason(
            f"it asks for more {what} than its {whose} allows a job", _EDIT.format(f"{edit} or {key}"), True
        )
    who = "all jobs together" if match["kind"] == "Grp" else "one user" if "User" in word else "its jobs"
    return PendingReason(
        f"its {whose} is at its limit of {what} for {who}: it starts when others end",
        f"{_LIMIT}; `hpc-router scale` to fewer replicas needs less",
    )
