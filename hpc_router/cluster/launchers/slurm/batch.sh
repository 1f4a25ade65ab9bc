# shellcheck shell=bash
# Sourced by every batch script of a deployment: each replica that the job carries leaves a record of its end, so
# nobody has to ask the controller. Bash 4.2 is enough. The functions are called in this order:
#   begin JOBS_FOLDER REPLICA...     from here on every end leaves a record; a job that nobody waits for ends here
#   ready                            before each setup line or module, and before the steps
#   setup_failed KEY                 after `||`: a setup line or module that did not work
#   step REPLICA COMMAND...          run a replica's step in the background
#   finish                           wait for all steps; the job's exit status is the worst of theirs

begin() {
    local replica
    hpc_router_jobs=$1
    hpc_router_replicas=()
    hpc_router_pids=()
    hpc_router_message=
    hpc_router_terminated=
    shift
    for replica in "$@"; do
        hpc_router_unwanted "$hpc_router_jobs/$replica" || hpc_router_replicas+=("$replica")
    done
    if ((${#hpc_router_replicas[@]} == 0)); then
        printf 'hpc-router: nobody waits for this job any more\n' >&2
        exit 0
    fi
    ready
    umask 077
    # Slurm 22.05 and later: srun takes the number of CPUs from nowhere else.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export SUBMITIT_EXECUTOR=slurm
}

# Setup lines run in this shell: what they made of its options and traps holds until here.
ready() {
    hpc_router_plain
    trap - ERR DEBUG RETURN
    trap 'hpc_router_leave $?' EXIT
    # The steps, or what setup runs, are asked to end as well; their records are still to be written.
    trap 'hpc_router_terminated=yes' TERM
    [[ -z $hpc_router_terminated ]] || exit 143
}

setup_failed() {
    local status=$?
    ready
    if ((status == 143)); then
        sleep 1 # Slurm signals one process after the other: this shell may be the last to hear of it
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
            wait "$pid" # a signal cuts it short
        done
        wait "$pid"
        status=$?
        # Where a signal met the end of the step, bash (5.2) may tell another status: its record counts.
        ! hpc_router_recorded "${hpc_router_replicas[index]}" || status=${BASH_REMATCH[1]}
        ((status <= worst)) || worst=$status
    done
    exit "$worst"
}

# The status that a replica's step has left, in BASH_REMATCH[1].
hpc_router_recorded() {
    local pattern='"status": ([0-9]+)'
    [[ -r $hpc_router_jobs/$1/ended.json && $(<"$hpc_router_jobs/$1/ended.json") =~ $pattern ]]
}

hpc_router_plain() {
    set +eu +o pipefail
    set +o posix
}

# Whether nobody waits for the replica of this folder: its end is known, or Slurm took this job although sbatch had
# been given up, and the replica is another job's. The submitter writes job.json a moment after sbatch has returned, so
# one that is absent says nothing.
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
        rm -f "$temporary" # a full disk: Slurm's own word has to do
    fi
}
