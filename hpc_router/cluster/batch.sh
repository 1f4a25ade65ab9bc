# shellcheck shell=bash
# Sourced by every batch script of a deployment: each replica that the job carries leaves a record of its end, so
# nobody has to ask the controller. Bash 4.2 is enough. The functions are called in this order:
#   begin JOBS_FOLDER REPLICA...     from here on every end leaves a record
#   setup_failed KEY                 after `||`: a setup line or module that did not work
#   step REPLICA COMMAND...          run a replica's step in the background
#   finish                           wait for all steps; the job's exit status is the worst of theirs

begin() {
    hpc_router_jobs=$1
    shift
    hpc_router_replicas=("$@")
    hpc_router_pids=()
    hpc_router_message=
    umask 077
    trap 'hpc_router_leave $?' EXIT
    trap : TERM # the steps are asked to end as well; their records are still to be written
    # Slurm 22.05 and later: srun takes the number of CPUs from nowhere else.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export SUBMITIT_EXECUTOR=slurm
}

setup_failed() {
    hpc_router_message="$1 failed on $(uname -n)"
    printf 'hpc-router: %s\n' "$hpc_router_message" >&2
    exit 1
}

step() {
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
    local pid status worst=0
    for pid in "${hpc_router_pids[@]}"; do
        while kill -0 "$pid" 2>/dev/null; do
            wait "$pid" # a signal cuts it short
        done
        wait "$pid"
        status=$?
        ((status <= worst)) || worst=$status
    done
    exit "$worst"
}

hpc_router_leave() {
    local replica
    for replica in "${hpc_router_replicas[@]}"; do
        hpc_router_ended "$replica" "$1" "$hpc_router_message"
    done
}

hpc_router_ended() {
    local file=$hpc_router_jobs/$1/ended.json message=${3//[[:cntrl:]]/ }
    [[ ! -e $file ]] || return 0
    message=${message//\\/\\\\}
    message=${message//\"/\\\"}
    [[ -z $message ]] && message=null || message="\"$message\""
    printf '{"at": %s, "message": %s, "status": %d}\n' "$(date +%s)" "$message" "$2" >"$file.$BASHPID" &&
        mv "$file.$BASHPID" "$file"
}
