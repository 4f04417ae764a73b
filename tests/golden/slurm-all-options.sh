#!/bin/bash
#SBATCH --job-name=lora
#SBATCH --comment=hpcdl:20260131-120000-ab12
#SBATCH --array=0-2%2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=48
#SBATCH --mem=492032M
#SBATCH --time=1440
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --account='project 7'
#SBATCH --qos=high
#SBATCH --constraint='a100|h100'
#SBATCH --exclude='c[1-2,7]'
#SBATCH --reservation=tutorial
#SBATCH --signal=B:USR2@300
#SBATCH --dependency=afterok:4711:4712_3
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --output='/shared/my runs/100%%/.submissions/20260131-120000-ab12/slurm-%A_%a.out'
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --mail-type=END,FAIL
#SBATCH --exclusive

# Each node's agent starts: /shared/env/bin/python -m torch.distributed.run --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=JOB_ID --rdzv-endpoint=HEAD:PORT --rdzv-conf=is_host=FIRST_NODE,join_timeout=600,read_timeout=600 --local-addr=THIS_NODE --max-restarts=3 --signals-to-handle=SIGQUIT --tee=3 --log-dir=TMP -m hpcdl.worker.main RUN_DIR
HPCDL_PYTHON=/shared/env/bin/python
HPCDL_CODE=''
HPCDL_RUNS_FILE='/shared/my runs/100%/.submissions/20260131-120000-ab12/runs.txt'
HPCDL_SRUN_ARGS=(--mpi=none '--cpu-bind=map_cpu:0, 1')
HPCDL_SETUP=(
    'module load cuda/12.4'
    'source '"'"'/opt/my env/bin/activate'"'"''
)
HPCDL_TEARDOWN=(
    'rm -rf '"'"'/tmp/my cache'"'"''
)

BODY OF slurm/torchrun.sbatch
