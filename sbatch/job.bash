# Sourced by the scripts in this folder, which set `home` and `usage` first; not to be submitted. Requires bash 4.2.
#   refuse WHY                       exit status 2
#   prepare new|existing RUN         check what every job needs
#   alone WORD...                    the same for jobs without a run directory; WORDs are the first arguments
#   service                          for jobs with a replica or router: record its end, reachable from other nodes
#   start MODULE NODES OVERRIDE...   run one task on each node; return its exit status

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
    # Without a config the default is cluster=local, whose services listen on the loopback only.
    [[ -e $run/config.yaml ]] || words+=(cluster.kind=slurm)
    # A service that is killed cannot write its record. Only for batch jobs: in an allocation other steps may run.
    if [[ ${SLURM_TASK_PID:-} == "$$" ]]; then
        trap 'record $?' EXIT
        trap : TERM # the service gets SIGTERM as well; this shell must live to write the record
    fi
}

start() {
    # From Slurm 22.05 on srun takes the number of CPUs only from here.
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
