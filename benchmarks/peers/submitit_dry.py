"""submitit: builds the Slurm executor, prints the sbatch text it would submit, submits nothing."""

import sys

from submitit.slurm.slurm import SlurmExecutor


class DryExecutor(SlurmExecutor):
    """submitit refuses to make a Slurm executor where there is no srun; nothing here needs one."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def main() -> None:
    executor = DryExecutor(folder=sys.argv[1])
    executor.update_parameters(
        job_name="lora_llama",
        nodes=2,
        ntasks_per_node=1,
        cpus_per_task=2,
        mem="8GB",
        time=60,
        signal_delay_s=90,
    )
    print(executor._make_submission_file_text(executor._submitit_command_str, "dry"))


if __name__ == "__main__":
    main()
