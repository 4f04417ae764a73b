#!/bin/bash
# lora: 1 run on this machine
# The agent starts: /usr/bin/python3 -m torch.distributed.run --nnodes=1 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-id=JOB_ID --rdzv-endpoint=127.0.0.1:0 --rdzv-conf=is_host=1,join_timeout=600,read_timeout=600 --local-addr=127.0.0.1 --max-restarts=3 --signals-to-handle=SIGQUIT --tee=3 --log-dir=TMP -m hpcdl.worker.main RUN_DIR
HPCDL_PYTHON=/usr/bin/python3
HPCDL_CODE=''
HPCDL_RUNS_FILE=/shared/runs/.submissions/20260131-120000-ab12/runs.txt
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


export HPCDL_LOCAL=1
"$HPCDL_PYTHON" -m hpcdl.launch.job "$HPCDL_RUNS_FILE" 0
