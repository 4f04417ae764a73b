#!/bin/bash
#SBATCH --job-name=lora
#SBATCH --comment=hpcdl:20260131-120000-ab12
#SBATCH --array=0-0%1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --gpus-per-node=2
#SBATCH --signal=USR2@120
#SBATCH --output=/shared/runs/.submissions/20260131-120000-ab12/slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue

# Each node's agent starts: python3 -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-id=JOB_ID --rdzv-endpoint=HEAD:PORT --rdzv-conf=is_host=FIRST_NODE,join_timeout=600,read_timeout=600 --local-addr=THIS_NODE --max-restarts=3 --signals-to-handle=SIGQUIT --tee=3 --log-dir=TMP -m hpcdl.worker.main RUN_DIR
HPCDL_PYTHON=/shared/env/bin/python
HPCDL_CODE=/shared/runs/.code/0123456789abcdef
HPCDL_RUNS_FILE=/shared/runs/.submissions/20260131-120000-ab12/runs.txt
HPCDL_SRUN_ARGS=()
HPCDL_INSIDE=(
    apptainer
    exec
    --no-mount=home,cwd
    --pwd=/shared/runs
    --nv
    --mount=type=bind,source=/tmp,destination=/tmp
    --mount=type=bind,source=/shared/runs,destination=/shared/runs
    '--mount=type=bind,"source=/shared/texts, old","destination=/shared/texts, old",ro'
    --mount=type=bind,source=/opt/site,destination=/opt/x
    --env
    'NCCL_DEBUG=INFO, WARN'
    '/images/my train.sif'
    python3
)
HPCDL_SETUP=()
HPCDL_TEARDOWN=()

BODY OF slurm/torchrun.sbatch
