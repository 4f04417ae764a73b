#!/bin/bash
#SBATCH --job-name=lora
#SBATCH --comment=hpcdl:20260131-120000-ab12
#SBATCH --array=0-0%1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --gres=gpu:a100:4
#SBATCH --signal=USR2@120
#SBATCH --output=/shared/runs/.submissions/20260131-120000-ab12/slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue

# Each node's agent starts: /opt/venv/bin/python -m torch.distributed.run --nnodes=1 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-id=JOB_ID --rdzv-endpoint=127.0.0.1:0 --rdzv-conf=is_host=1,join_timeout=600,read_timeout=600 --local-addr=127.0.0.1 --max-restarts=3 --signals-to-handle=SIGQUIT --tee=3 --log-dir=TMP -m hpcdl.worker.main RUN_DIR
HPCDL_PYTHON=/shared/env/bin/python
HPCDL_CODE=/shared/runs/.code/0123456789abcdef
HPCDL_RUNS_FILE=/shared/runs/.submissions/20260131-120000-ab12/runs.txt
HPCDL_SRUN_ARGS=(--mpi=none '--container-image=nvcr.io#nvidia/pytorch:25.09-py3' --container-mounts=/tmp:/tmp,/shared/runs:/shared/runs,/shared/texts:/shared/texts:ro --container-workdir=/shared/runs --container-env=HPCDL_CODE,PYTHONPATH,PYTHONSAFEPATH,PYTHONNOUSERSITE,TMPDIR,HF_HOME,HPCDL_CACHE,NVIDIA_VISIBLE_DEVICES,NVIDIA_DRIVER_CAPABILITIES --no-container-mount-home --no-container-remap-root --no-container-entrypoint --container-writable)
HPCDL_INSIDE=(
    /opt/venv/bin/python
)
HPCDL_SETUP=()
HPCDL_TEARDOWN=()

BODY OF slurm/torchrun.sbatch
