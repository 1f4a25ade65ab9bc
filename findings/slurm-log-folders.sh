#!/usr/bin/env bash
# Slurm 24.11.5 (Debian 13, packages slurmctld and slurmd)
#
# slurmd creates the missing folders of a batch job's --output on the node. A job whose shared folder is not mounted
# there therefore starts, and writes its log where nobody looks. With 22.05.8 (Debian 12) such a job cannot start.
#
# Seen on 29 November 2026:
#   slurm-wlm 24.11.5
#   before: /not-mounted does not exist
#   after: JobState=COMPLETED, and /not-mounted/project/logs/job.log says: started
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
for try in $(seq 60); do
    [ "$(sinfo --noheader --format=%T 2>/dev/null)" != idle ] || break
    sleep 1
done
sbatch --version
[ -e /not-mounted ] || echo 'before: /not-mounted does not exist'
sbatch --wait --quiet --output=/not-mounted/project/logs/job.log --wrap='echo started' || true
state=$(scontrol --oneliner show job 1 | grep -o 'JobState=[A-Z_]*')
echo "after: $state, and /not-mounted/project/logs/job.log says: $(cat /not-mounted/project/logs/job.log 2>&1)"
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
[[ $said == *'after: JobState=COMPLETED, '*'says: started' ]]
