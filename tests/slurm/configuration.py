"""The test cluster's configuration files, built from its shape: the content of a site's /etc/slurm.

Rules: timeouts are as short as Slurm allows, because tests wait for them. Everything else is as on a plain site, so
that what works here also works there. Two partitions have all nodes, and the least loaded node is used first. Jobs of
`urgent` preempt those of `batch`, which get GRACE_S between SIGTERM and SIGKILL; then they are requeued, or cancelled
if they forbid that. cgroups enforce nothing, because those of the machine must not be changed. `proctrack` decides
which processes of a step get its signals: all of them with linuxproc, only the task with cgroup.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from tests.slurm.init import LOGIN

SLURMD_TIMEOUT_S: Final = 10
GRACE_S: Final = 5
KILL_WAIT_S: Final = 5
CONTROLLER: Final = "ctl"
ACCOUNT: Final = "test"
DATABASE: Final = "slurm_acct"
Proctrack = Literal["linuxproc", "cgroup"]
PROCTRACKS: Final[tuple[Proctrack, ...]] = ("linuxproc", "cgroup")
PARTITIONS: Final = ("batch", "urgent")
GPUS: Final = 4
MIB_PER_CPU: Final = 2000
LAST_BYTES: Final = {CONTROLLER: 1, "n1": 11, "n2": 12, "n3": 13, "c1": 21, LOGIN: 31}
NODES: Final = tuple(name for name in LAST_BYTES if name not in (CONTROLLER, LOGIN))


def gpus_of(name: str) -> int:
    return GPUS if name.startswith("n") else 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The hosts of a cluster. `node_cpus`: CPUs that each node claims to have; Slurm does not check them."""

    folder: Path
    network: str
    accounting: bool
    node_cpus: int
    proctrack: Proctrack
    outside: str

    def address(self, name: str) -> str:
        return f"{self.network}.{LAST_BYTES[name]}"

    @property
    def munge_socket(self) -> Path:
        return self.folder / "munge" / "socket"

    @property
    def database_socket(self) -> Path:
        return self.folder / "database" / "socket"

    def write(self) -> None:
        etc = self.folder / "etc"
        for name, text in (
            ("hosts", self._hosts()),
            ("slurm.conf", self._slurm()),
            ("gres.conf", f"NodeName=n[1-3] Name=gpu File={self.folder}/gpus/gpu[0-{GPUS - 1}]\n"),
            ("cgroup.conf", "CgroupPlugin=cgroup/v1\n"),
            ("slurmdbd.conf", self._slurmdbd()),
        ):
            (etc / name).write_text(text)
        (etc / "slurmdbd.conf").chmod(0o600)  # or slurmdbd refuses it

    def _hosts(self) -> str:
        hosts = [f"{self.address(name)} {name}" for name in LAST_BYTES]
        return "\n".join(["127.0.0.1 localhost", *hosts, f"{self.network}.254 {self.outside}", ""])

    def _nodes(self) -> str:
        size = f"CPUs={self.node_cpus} RealMemory={self.node_cpus * MIB_PER_CPU} State=UNKNOWN"
        gres = {name: f" Gres=gpu:{gpus_of(name)}" if gpus_of(name) else "" for name in NODES}
        return "\n".join(f"NodeName={name} NodeAddr={self.address(name)} {size}{gres[name]}" for name in NODES)

    def _accounting(self) -> str:
        if not self.accounting:
            return "AccountingStorageType=accounting_storage/none"
        return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={self.address(CONTROLLER)}
AccountingStoragePass={self.munge_socket}
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=10"""

    def _slurm(self) -> str:
        folder = self.folder
        return f"""\
ClusterName=hpcr
SlurmctldHost={CONTROLLER}({self.address(CONTROLLER)})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.munge_socket}
CryptoType=crypto/munge
MpiDefault=none
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/{self.proctrack}
TaskPlugin=task/none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={MIB_PER_CPU // 2}
GresTypes=gpu
MaxArraySize=1001
ReturnToService=2
SlurmdTimeout={SLURMD_TIMEOUT_S}
SlurmctldTimeout=10
MessageTimeout=5
KillWait={KILL_WAIT_S}
UnkillableStepTimeout=60
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{self._accounting()}
{self._nodes()}
PartitionName=batch Nodes=ALL Default=YES DefaultTime=01:00:00 MaxTime=1-00:00:00 PriorityTier=1 \
LLN=YES PreemptMode=REQUEUE GraceTime={GRACE_S}
PartitionName=urgent Nodes=ALL DefaultTime=01:00:00 MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF
"""

    def _slurmdbd(self) -> str:
        return f"""\
DbdHost={CONTROLLER}
DbdAddr={self.address(CONTROLLER)}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.munge_socket}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc={DATABASE}
LogFile={self.folder}/log/slurmdbd.log
PidFile={self.folder}/run/slurmdbd.pid
"""
