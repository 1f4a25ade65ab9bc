# shellcheck shell=bash
# Sourced by every batch script of a deployment. Writes a record of the end of each replica in the job, so that the
# controller need not be queried. Needs bash 4.2. The functions are called in this order:
#   begin JOBS_FOLDER REPLICA...     from here on each end leaves a record; the job ends here if no replica is wanted
#   ready                            before each setup line or module, and before the steps
#   setup_failed KEY                 after `||`: a setup line or module failed
#   step REPLICA COMMAND...          run a replica's step in the background
#   finish                           wait for all steps; the exit status of the job is the highest of theirs

begin() {
    local replica
    hpc_router_jobs=$1
    hpc_router_replicas=()
    hpc_router_pids=()
    hpc_router_message=
    hpc_router_terminated=
    shift
    hpc_router_seen || exit 1
    for replica in "$@"; do
        hpc_router_unwanted "$hpc_router_jobs/$replica" || hpc_router_replicas+=("$replica")
    done
    if ((${#hpc_router_replicas[@]} == 0)); then
        printf 'hpc-router: no replica of this job is wanted any more\n' >&2
        exit 0
    fi
    ready
    umask 077
    # Slurm 22.05 and later: srun takes the number of CPUs from nowhere else.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export SUBMITIT_EXECUTOR=slurm
}

# Setup lines run in this shell, so this resets the shell options and traps that they have set.
ready() {
    hpc_router_plain
    trap - ERR DEBUG RETURN
    trap 'hpc_router_leave $?' EXIT
    # Slurm sends SIGTERM to the steps too; this shell must go on to write their records.
    trap 'hpc_router_terminated=yes' TERM
    [[ -z $hpc_router_terminated ]] || exit 143
}

setup_failed() {
    local status=$?
    ready
    if ((status == 143)); then
        sleep 1 # Slurm signals one process after the other: this shell may get the signal last
        ready
    fi
    hpc_router_message="$1 failed on $(uname -n)"
    printf 'hpc-router: %s\n' "$hpc_router_message" >&2
    exit 1
}

step() {
    local replica
    for replica in "${hpc_router_replicas[@]}"; do
        [[ $replica != "$1" ]] || hpc_router_step "$@"
    done
}

hpc_router_step() {
    (
        trap : TERM
        trap - EXIT
        export HPC_ROUTER_REPLICA=$1
        "${@:2}"
        status=$?
        hpc_router_ended "$1" "$status" ''
        exit "$status"
    ) &
    hpc_router_pids+=($!)
}

finish() {
    local index pid status worst=0
    for index in "${!hpc_router_pids[@]}"; do
        pid=${hpc_router_pids[index]}
        while kill -0 "$pid" 2>/dev/null; do
            wait "$pid" # returns early on a signal
        done
        wait "$pid"
        status=$?
        # If a signal arrives when the step ends, bash 5.2 may return another status: the record counts.
        ! hpc_router_recorded "${hpc_router_replicas[index]}" || status=${BASH_REMATCH[1]}
        ((status <= worst)) || worst=$status
    done
    exit "$worst"
}

# Puts the recorded status of a replica's step into BASH_REMATCH[1].
hpc_router_recorded() {
    local pattern='"status": ([0-9]+)'
    [[ -r $hpc_router_jobs/$1/ended.json && $(<"$hpc_router_jobs/$1/ended.json") =~ $pattern ]]
}

hpc_router_plain() {
    set +eu +o pipefail
    set +o posix
}

# Whether this node sees the run directory. Slurm 24.11 and later create the missing folders of a job's log on a node
# that does not, so the job starts. It must end without a record, as if it could not start. A file system may show new
# files late.
hpc_router_seen() {
    local try
    for try in 1 2 3 4 5; do
        [[ ! -e ${hpc_router_jobs%/*}/config.yaml ]] || return 0
        ((try == 5)) || sleep 1
    done
    printf 'hpc-router: %s does not see the run directory %s\n' "$(uname -n)" "${hpc_router_jobs%/*}" >&2
    return 1
}

# Whether the replica of this folder is not wanted: its end is recorded, or sbatch seemed to fail and the replica was
# submitted again as another job. The submitter writes job.json after sbatch has returned, so a missing one does not
# count.
hpc_router_unwanted() {
    local info pattern='"job_id": "([^"]*)"'
    [[ ! -e $1/exit.json && ! -e $1/ended.json ]] || return 0
    [[ -n ${SLURM_JOB_ID:-} && -r $1/job.json ]] || return 1 # a step of an allocation has no such variable
    info=$(<"$1/job.json")
    [[ $info =~ $pattern && ${BASH_REMATCH[1]} != "$SLURM_JOB_ID" ]]
}

hpc_router_leave() {
    local replica status=$1
    hpc_router_plain
    if [[ -n $hpc_router_terminated ]] && ((${#hpc_router_pids[@]} == 0)); then
        status=143
        hpc_router_message=
    fi
    for replica in "${hpc_router_replicas[@]}"; do
        hpc_router_ended "$replica" "$status" "$hpc_router_message"
    done
}

hpc_router_ended() {
    local file=$hpc_router_jobs/$1/ended.json message=${3//[[:cntrl:]]/ }
    local temporary=$file.$BASHPID
    [[ ! -e $file ]] || return 0
    message=${message//\\/\\\\}
    message=${message//\"/\\\"}
    [[ -z $message ]] && message=null || message="\"$message\""
    if ! { printf '{"at": %s, "message": %s, "status": %d}\n' "$(date +%s)" "$message" "$2" >"$temporary" &&
        mv "$temporary" "$file"; }; then
        rm -f "$temporary" # the disk is full: the state in Slurm has to suffice
    fi
}
