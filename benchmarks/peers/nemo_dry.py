"""NeMo-Run: its Slurm executor with the torchrun launcher, dry run."""

import sys

import nemo_run as run


def main() -> None:
    executor = run.SlurmExecutor(
        account="none",
        partition="debug",
        nodes=2,
        ntasks_per_node=2,
        time="01:00:00",
        launcher="torchrun",
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=sys.argv[1]),
    )
    run.run(run.Script("main.py"), executor=executor, dryrun=True, name="lora_llama")


if __name__ == "__main__":
    main()
