#!/usr/bin/env bash
# Slurm 24.11.5 (Debian 13, packages slurmctld and slurmd)
#
# A batch job submitted with --no-requeue is requeued all the same if its node does not answer when the job is
# launched. It then waits for two minutes (reason BeginTime) and starts on another node, although squeue showed it as
# COMPLETING. Slurm 22.05.8 (Debian 12) does the same without the two minutes; there the second start of a job with
# GPUs cannot create steps, and its GPU stays counted as used.
#
# Seen on 30 November 2026:
#   slurm-wlm 24.11.5
#   launched: JobState=RUNNING Requeue=0 Restarts=0
#   then: JobState=PENDING Requeue=0 Restarts=1
#
# Needs root, debootstrap and the namespaces of Linux: Slurm runs in a root of its own, without a network.
set -euo pipefail

root=$(mktemp --directory /var/tmp/finding-XXXXXX)
trap 'rm --recursive --force "$root"' EXIT
chmod 755 "$root"
debootstrap --variant=minbase --include=slurmctld,slurmd,slurm-client,munge trixie "$root" >"$root.log" 2>&1 || {
    tail -n 3 "$root.log" >&2
    exit 2
}
rm "$root.log"

cat >"$root/etc/slurm/slurm.conf" <<'END'
ClusterName=one
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmdParameters=config_overrides
MessageTimeout=5
SlurmdTimeout=10
ReturnToService=2
NodeName=node1 CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES
END
echo 'CgroupPlugin=disabled' >"$root/etc/slurm/cgroup.conf"
printf '%s\n' '127.0.0.1 localhost' '198.18.0.1 node1' >"$root/etc/hosts"
mkdir --parents "$root/var/spool/slurmctld" "$root/var/spool/slurmd"

cat >"$root/look.sh" <<'END'
set -eu
mkdir -p /run/munge
chown munge: /run/munge
setpriv --reuid=munge --regid=munge --clear-groups munged
slurmctld -D >/var/log/ctl 2>&1 &
slurmd -D >/var/log/d 2>&1 &
slurmd=$!
for try in $(seq 60); do
    [ "$(sinfo --noheader --format=%T 2>/dev/null)" != idle ] || break
    sleep 1
done
sbatch --version
job() {
    scontrol --oneliner show job 1 | grep -o -e 'JobState=[A-Z_]*' -e 'Requeue=[0-9]' -e 'Restarts=[0-9]' | paste -s -d ' '
}
kill -KILL "$slurmd"
sbatch --quiet --no-requeue --wrap=true
for try in $(seq 30); do
    case $(job) in *RUNNING*) break ;; esac
    sleep 0.2
done
echo "launched: $(job)"
for try in $(seq 120); do
    case $(job) in *PENDING*) break ;; esac
    sleep 1
done
echo "then: $(job)"
END
# shellcheck disable=SC2016 # the inner shell expands $0
said=$(unshare --mount --pid --net --uts --fork --kill-child bash -c '
    hostname node1
    ip link set lo up
    ip link add net0 type bridge
    ip address add 198.18.0.1/24 dev net0
    ip link set net0 up
    mount -t proc proc "$0/proc"
    exec chroot "$0" sh /look.sh' "$root")
echo "$said"
[[ $said == *'then: JobState=PENDING Requeue=0 Restarts=1' ]]
