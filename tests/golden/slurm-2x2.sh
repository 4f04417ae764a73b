#!/bin/bash
#SBATCH --job-name=lora
#SBATCH --comment=hpcdl:20260131-120000-ab12
#SBATCH --array=0-0%1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=4096M
#SBATCH --time=30
#SBATCH --signal=USR2@120
#SBATCH --output=/shared/runs/.submissions/20260131-120000-ab12/slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue

# Each node's agent starts: /shared/env/bin/python -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-id=JOB_ID --rdzv-endpoint=HEAD:PORT --rdzv-conf=is_host=FIRST_NODE,join_timeout=600,read_timeout=600 --local-addr=THIS_NODE --max-restarts=3 --signals-to-handle=SIGQUIT --tee=3 --log-dir=TMP -m hpcdl.worker.main RUN_DIR
HPCDL_PYTHON=/shared/env/bin/python
HPCDL_CODE=''
HPCDL_RUNS_FILE=/shared/runs/.submissions/20260131-120000-ab12/runs.txt
HPCDL_SRUN_ARGS=()
HPCDL_SETUP=()
HPCDL_TEARDOWN=()

# ---- hpcdl: the body of every job ----
tell() { printf 'hpcdl: %s: %s\n' "$(uname -n)" "$*" >&2; }

fail() {
    tell "$*"
    exit 1
}

# Whatever ends the job, and wherever: the teardown lines run, and the code stays what it was. In a shell of their
# own, so that an `exit` there is theirs; signals wait, since Slurm may be ending the job.
hpcdl_end() {
    local code=$?
    trap '' HUP INT TERM USR1 USR2
    set +eu
    (
        trap 'tell "cluster.teardown failed with code $? at: $BASH_COMMAND"' ERR
        eval "$(printf '%s\n' "${HPCDL_TEARDOWN[@]}")"
    )
    # Last, because the last words are the reason that `hpcdl status` shows.
    if [[ $hpcdl_stage == setup ]]; then
        ((code)) || code=1
        tell "cluster.setup failed with code $code${hpcdl_failed:+ at: $hpcdl_failed}; nothing was trained"
    fi
    exit "$code"
}

hpcdl_stage=setup hpcdl_failed=
set +u # what sites provide (module, conda) breaks on unset variables
set -e
trap hpcdl_end EXIT
trap 'hpcdl_failed=$BASH_COMMAND' ERR
eval "$(printf '%s\n' "${HPCDL_SETUP[@]}")"
trap - ERR
trap hpcdl_end EXIT # again: a setup line may have set one of its own
hpcdl_stage=training
set -euo pipefail

# hpcdl as it was at submission goes before what is installed, and before the folder that the job was sent from.
if [[ -n $HPCDL_CODE ]]; then
    export HPCDL_CODE PYTHONSAFEPATH=1 PYTHONPATH="$HPCDL_CODE${PYTHONPATH:+:$PYTHONPATH}"
else
    unset HPCDL_CODE # of a run that this one was launched from
fi

# ---- hpcdl: on Slurm's nodes ----
# A launch from inside another run must not take over what was that run's.
unset HPCDL_LOCAL HPCDL_HEAD HPCDL_PORT HPCDL_NODES HPCDL_TRY

# The job's nodes, the first one first. Inside some containers scontrol is missing.
node_names() {
    if command -v scontrol >/dev/null; then
        scontrol show hostnames "$SLURM_JOB_NODELIST"
    else
        "$HPCDL_PYTHON" -c 'import sys; from hpcdl.runs.hosts import expand_hosts; print(*expand_hosts(sys.argv[1]))' \
            "$SLURM_JOB_NODELIST"
    fi
}

# A name's first address that other machines can use: many nodes resolve their own name to 127.0.1.1.
address_of() {
    { getent ahostsv4 "$1" || getent ahosts "$1" || true; } |
        awk '$1 !~ /^(127\.|0\.|::1$|fe80:)/ { print $1; exit }'
}

# The head node's address, by its name, else by what Slurm itself uses to reach it.
head_address() {
    local address other
    address=$(address_of "$1")
    if [[ -z $address ]]; then
        other=$({ scontrol show node --oneliner "$1" || true; } | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
        [[ -n $other ]] && address=$(address_of "$other")
    fi
    # No guess: with localhost each node would be a world of its own, and the job would hang.
    [[ -n $address ]] || fail "no address of the head node $1 that other nodes could reach (getent ahosts $1)"
    printf '%s\n' "$address"
}

# Whether something on this machine, which is the head node, has this TCP port.
port_taken() {
    local hex
    printf -v hex '%04X' "$1"
    grep -qsE "^ *[0-9]+: [0-9A-F]+:$hex " /proc/net/tcp /proc/net/tcp6
}

# A port that differs from job to job, below those that Linux gives to outgoing connections; the next one is free too.
free_port() {
    local start=$((SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} * 3)) i port
    for ((i = 0; i < 1000; i++)); do
        port=$((20000 + (start + i) % 12000))
        port_taken "$port" || port_taken $((port + 1)) || { printf '%s\n' "$port"; return; }
    done
    fail 'no free port from 20000 to 31999'
}

# A signal to this shell alone (scancel --batch, --signal=B:…) goes on to the agents. Not a terminal's Ctrl-C, which
# srun has had itself. SIGTERM becomes USR1: srun would end the step 32 s after it, in the middle of a long save.
relay() {
    hpcdl_signal=$1
    [[ -z $hpcdl_srun || ($1 == INT && -t 0) ]] || kill -s "${1/TERM/USR1}" "$hpcdl_srun" 2>/dev/null || true
}

names=$(node_names)
[[ -n $names ]] || fail "no node in SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
mapfile -t nodes <<<"${names// /$'\n'}"
export HPCDL_NODES="${nodes[*]}"
if ((${#nodes[@]} > 1)); then
    HPCDL_HEAD=$(head_address "${nodes[0]}")
    HPCDL_PORT=$(free_port)
    export HPCDL_HEAD HPCDL_PORT
fi

# By hand: compose once, here, on the job's first start. A requeued job finds the same run again.
index=()
if [[ -z $HPCDL_RUNS_FILE ]]; then
    HPCDL_RUNS_FILE=$("$HPCDL_PYTHON" -m hpcdl.launch.by_hand "$@")
    [[ -n $HPCDL_RUNS_FILE ]] || exit 0 # the run is there and complete
    index=(0)
fi

# All of the environment (a job submitted with --export=NONE would have no PATH here), CPUs said again (srun
# doesn't take them over from sbatch), no time limit for the slower nodes once the first task has ended, and one
# agent's failure ends the others. hpcdl.launch.steps starts srun, and again where a node or an agent was lost.
hpcdl_srun=
for name in HUP INT TERM USR1 USR2; do
    # shellcheck disable=SC2064 # the name as it is now
    trap "relay $name" "$name"
done
"$HPCDL_PYTHON" -m hpcdl.launch.steps "$HPCDL_RUNS_FILE" ${index[@]+"${index[@]}"} -- \
    srun --export=ALL --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 --wait=0 \
    ${HPCDL_SRUN_ARGS[@]+"${HPCDL_SRUN_ARGS[@]}"} &
hpcdl_srun=$!
# A signal ends `wait` at once, srun or not: again, until no signal has. The code is srun's own.
while :; do
    hpcdl_signal=
    wait "$hpcdl_srun" && code=0 || code=$?
    [[ -n $hpcdl_signal ]] || exit "$code"
done
