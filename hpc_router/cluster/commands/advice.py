"""The texts of `why`: what each displayed state means, and what to do about each reason of failure."""

from collections.abc import Mapping
from typing import Final

from hpc_router.cluster.commands.replica_view import DisplayedState
from hpc_router.state.job_records import FailureReason

_R = FailureReason
FAILURE_ADVICE: Final[Mapping[FailureReason, str]] = {
    _R.OUT_OF_MEMORY: "give it more memory by `hpc-router apply`: fewer tokens (max_model_len), a quantised model, "
    "more GPUs, or fewer replicas on one node",
    _R.WEIGHTS: "complete the model's files, then `hpc-router up` tries again; if the message names a wrong folder or "
    "hub id, change experts.{expert}.model (or that of its adapter) with `hpc-router apply`",
    _R.CUDA: "check the node's GPU and driver (nvidia-smi there) and that the engine's build matches it",
    _R.BAD_OPTION: "change the option that the message names with `hpc-router apply`",
    _R.INTERPRETER: "install the engine in the interpreter of experts.{expert}.engine.python, then `hpc-router up` "
    "tries again; `hpc-router apply` sets another interpreter",
    _R.TIMEOUT: "it did not answer in time: if it was loading, put the model on a faster file system, or raise "
    "experts.{expert}.engine.startup_timeout_s with `hpc-router apply`; once it was ready, it hung: look at its log's "
    "end and at its node",
    _R.KILLED: "it was killed from outside: by the node's memory limit, a user, or the system; `dmesg` may show it",
    _R.CRASHED: "read the log lines; `hpc-router up` tries again",
    _R.PORT_TAKEN: "another process has the port: end that process, then `hpc-router up` tries again; with "
    "`hpc-router apply router.port=0` the kernel chooses one",
    _R.RANK_LOST: "one of its nodes ended: the log of that rank shows the reason (`hpc-router logs {replica}` "
    "prints all of them); `hpc-router up` tries again",
    _R.SETUP: "change the line of cluster.setup or cluster.modules that the message names with `hpc-router apply`",
    _R.RUN_UNSEEN: "use a file system that all nodes share: `hpc-router up` in a new run there (`runs=DIR` or "
    "`--run DIR`); if only that node lacks it, `hpc-router drain NODE`, then `hpc-router up` tries again",
    _R.UNANSWERED: "Slurm did not answer, or takes no more jobs of yours for now; the submission is retried",
    _R.REFUSED: "change the key that the message names with `hpc-router apply`, which checks it as `plan` does",
    _R.NODE_FAILED: "its node failed: a new job is submitted; `hpc-router drain NODE` keeps further jobs off a node",
    _R.PREEMPTED: "a job of higher priority took its place: a new job is submitted; `hpc-router apply` with "
    "another cluster.partition or cluster.qos may avoid that",
    _R.WALLTIME: "its walltime ended: a new job is submitted; a longer cluster.walltime (`hpc-router apply`) makes "
    "that rarer",
    _R.CANCELLED: "a user or an administrator cancelled its job: a new job is submitted; `hpc-router scale` or "
    "`down` ends it for good",
    _R.DRAINED: "it was asked to stop; `hpc-router up` or `scale` starts it again",
    _R.VANISHED: "it was killed, or could not start: its log shows how far it came; `hpc-router up` tries again",
}
STATE_TEXT: Final[Mapping[DisplayedState, str]] = {
    DisplayedState.MISSING: "no job was submitted yet: `hpc-router up` or `hpc-router reconcile` submits one",
    DisplayedState.SUBMITTED: "its job was submitted and has not begun yet",
    DisplayedState.STARTING: "it is starting",
    DisplayedState.LOADING: "its engine is loading the model",
    DisplayedState.RESTARTING: "its engine failed and is started again",
    DisplayedState.DRAINING: "it takes no new requests and ends after those in flight",
    DisplayedState.WAITING: "it failed and is submitted again after a pause",
    DisplayedState.FAILED: "it failed too often, or for a reason that a restart cannot fix",
    DisplayedState.STOPPED: "it is not running",
    DisplayedState.REGISTERED: "it runs elsewhere: `hpc-router status` shows whether the router reaches it",
}
ROUTER_OPTION_ADVICE: Final = "change router.* as the message says with `hpc-router apply`"


DEGRADED_ADVICE: Final = "`hpc-router logs {replica}` may show the reason; `hpc-router drain {replica}` replaces it"
EXTERNAL_ADVICE: Final = (
    "start or repair the server there, or `hpc-router unregister {replica}`; if it does serve, `hpc-router register` "
    "it again with --probe-path, --no-probe or --token-file"
)
CUT_ADVICE: Final = (
    "a longer {key} (`hpc-router apply`) lets drains wait longer; preemption allows no more than GraceTime"
)
GAP_ADVICE: Final = (
    "`sacctmgr show qos` and `scontrol show assoc_mgr` show the limits; another replica would serve meanwhile, and a "
    "longer cluster.walltime (`hpc-router apply`) makes it rarer"
)
STEP_ADVICE: Final = "`squeue --steps --jobs={job_id}` lists the steps that hold the job's resources"
SLURM_ADVICE: Final = (
    "`scontrol ping` shows whether slurmctld is up; replicas that run go on serving, and missing ones are submitted "
    "once it answers"
)
LOG_ADVICE: Final = "`hpc-router logs router` shows more"
SHARE_ADVICE: Final = (
    "`hpc-router doctor` checks the folder on a node; `hpc-router apply router.share_dir=DIR` names another one"
)
SETTINGS_ADVICE: Final = "`hpc-router set KEY=` restores the configured value; an artefact can be trained again"
SPACE_ADVICE: Final = "free space or raise the quota: records, logs and the control loop need it"
NODE_EXCLUDED_ADVICE: Final = "`hpc-router nodes forget {node}` lets jobs start there again, once it is repaired"
MAX_GPUS_ADVICE: Final = (
    "raise cluster.max_gpus, or lower the min_replicas or idle_s of other experts (`hpc-router apply`)"
)
NODE_FAILING_ADVICE: Final = (
    "the control loop excludes at most a quarter of a partition's nodes; `hpc-router drain {node}` keeps jobs off it"
)
