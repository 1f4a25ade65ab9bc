# Sourced by the scripts beside it; not to be submitted. Bash 4.2 is enough. They set `home` and `usage` before.
#   refuse WHY                       exit status 2
#   prepare new|existing RUN         checks what every job needs
#   alone WORD...                    the same for jobs without a run directory; WORDs stand first
#   service                          for jobs that carry a replica: its end leaves a record, other nodes reach it
#   start MODULE NODES OVERRIDE...   one task on each node; returns with its exit status

refuse() {
    printf '%s: %s\n%s\n' "${SLURM_JOB_NAME:-hpc_router}" "$1" "${usage:?}" >&2
    exit 2
}

prepare() {
    [[ -n $2 ]] || refuse 'the run directory has no name'
    run=$(realpath --canonicalize-missing -- "$2")
    [[ $1 == new || -d $run ]] || refuse "there is no run directory $run on $(uname -n) (is it on a shared file system?)"
    alone "run='${run//\'/\\\'}'"
}

alone() {
    [[ -n ${SLURM_JOB_ID:-} ]] || refuse 'this is a Slurm job: submit it with sbatch'
    python=${HPC_ROUTER_PYTHON:-python3}
    command -v "$python" >/dev/null || refuse "HPC_ROUTER_PYTHON=$python: no such program on $(uname -n)"
    words=("$@")
    umask 077
    PYTHONPATH=$(realpath -- "${home:?}")${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
}

service() {
    # A run without a config does not say that it is a cluster's, where nobody reaches a service on the loopback.
    [[ -e $run/config.yaml ]] || words+=(cluster.kind=slurm)
    # What the service cannot say when it is killed. In an allocation others may run: only of a batch job.
    if [[ ${SLURM_TASK_PID:-} == "$$" ]]; then
        trap 'record $?' EXIT
        trap : TERM # the service is asked to end as well; its record is still to be written
    fi
}

start() {
    # Slurm 22.05 and later: srun takes the number of CPUs from nowhere else.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    srun --nodes="$2" --ntasks="$2" --ntasks-per-node=1 --cpus-per-task="$SRUN_CPUS_PER_TASK" --kill-on-bad-exit=1 \
        --export=ALL --unbuffered "$python" -m "$1" "${words[@]}" "${@:3}"
}

record() {
    local info folder
    while IFS= read -r info; do
        folder=${info%/*}
        [[ -e $folder/ended.json ]] && continue
        printf '{"at": %s, "message": null, "status": %d}\n' "$(date +%s)" "$1" >"$folder/.ended.json.$$"
        mv -- "$folder/.ended.json.$$" "$folder/ended.json"
    done < <(grep -lsF -- "\"job_id\": \"$SLURM_JOB_ID\"" "$run"/jobs/*/job.json)
}
