#!/usr/bin/env bash
# Slurm 24.11.5 (Debian 13, packages slurmctld and slurmd)
#
# A step with --overlap, which shares the resources of other steps, cannot start beside a step that holds the job's
# memory, if the job's memory was asked for per CPU: srun then asks for memory of the step's own, and that is not shared.
# It does not wait either. If the job's memory was asked for per node, or with --mem=0, the step starts. The same with
# 22.05.8 and 26.05.5.
#
# Seen on 30 November 2026:
#   slurm-wlm 24.11.5
#   --mem-per-cpu=100, srun --overlap: srun: error: Unable to create step for job 1: Memory required by task is not available
#   --mem-per-cpu=100, srun --overlap --mem=0: started
#   --mem=200, srun --overlap: started
#   --mem=200, srun --overlap --mem=0: started
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
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmdParameters=config_overrides
NodeName=node1 CPUs=2 RealMemory=400 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES
END
echo 'CgroupPlugin=disabled' >"$root/etc/slurm/cgroup.conf"
printf '%s\n' '127.0.0.1 localhost' '198.18.0.1 node1' >"$root/etc/hosts"
mkdir --parents "$root/var/spool/slurmctld" "$root/var/spool/slurmd"
cat >"$root/job.sh" <<'END'
#!/bin/sh
srun --ntasks=1 sleep 15 &
sleep 3
try() { if srun --overlap --ntasks=1 "$@" true 2>/tmp/said; then echo started; else head -1 /tmp/said; fi; }
echo "$1, srun --overlap: $(try)"
echo "$1, srun --overlap --mem=0: $(try --mem=0)"
kill %1
END
cat >"$root/look.sh" <<'END'
set -eu
mkdir -p /run/munge
chown munge: /run/munge
setpriv --reuid=munge --regid=munge --clear-groups munged
slurmctld -D >/var/log/ctl 2>&1 &
slurmd -D >/var/log/d 2>&1 &
for try in $(seq 60); do
    [ "$(sinfo --noheader --format=%T 2>/dev/null)" != idle ] || break
    sleep 1
done
sbatch --version
for memory in --mem-per-cpu=100 --mem=200; do
    sbatch --wait --quiet --ntasks=2 "$memory" --output=/job.log /job.sh "$memory" || true
    grep overlap /job.log
done
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
[[ $said == *'--mem-per-cpu=100, srun --overlap: '*'Memory required by task is not available'* ]]
[[ $said == *'--mem-per-cpu=100, srun --overlap --mem=0: started'*'--mem=200, srun --overlap: started'* ]]
