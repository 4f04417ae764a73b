#!/bin/bash
# lora: 3 runs on this machine
# The agent starts: /usr/bin/python3 -m torch.distributed.run --nnodes=1 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-id=JOB_ID --rdzv-endpoint=127.0.0.1:0 --rdzv-conf=is_host=1,join_timeout=600,read_timeout=600 --local-addr=127.0.0.1 --max-restarts=3 --signals-to-handle=SIGQUIT --tee=3 --log-dir=TMP -m hpcdl.worker.main RUN_DIR
HPCDL_PYTHON=/usr/bin/python3
HPCDL_CODE=''
HPCDL_RUNS_FILE='/home/me/my runs/.submissions/20260131-120000-ab12/runs.txt'
HPCDL_SETUP=(
    'source env/bin/activate'
)
HPCDL_TEARDOWN=()

FRAME OF slurm/torchrun.sbatch


export HPCDL_LOCAL=1
# One after the other; a failed run doesn't keep the next from its turn, an interrupt (130) does.
status=0
for index in $(seq 0 2); do
    "$HPCDL_PYTHON" -m hpcdl.launch.job "$HPCDL_RUNS_FILE" "$index" || {
        code=$?
        ((code > status)) && status=$code
        ((code == 130)) && break
    }
done
exit "$status"
