"""Where a run happens and what it is given, in Slurm's words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from hpcdl.spec.kubernetes import KubernetesSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionLimits:
    """What one node of a partition has; a request beyond it is refused before submission."""

    nodes: Annotated[int, Ge(1)] | None = None
    """Nodes in the partition."""
    cpus_per_node: Annotated[int, Ge(1)] | None = None
    """CPUs that Slurm schedules on a node."""
    mem_gb: Annotated[float, Gt(0)] | None = None
    """Memory of a node, in GiB."""
    gpus_per_node: Annotated[int, Ge(0)] | None = None
    """GPUs of a node."""
    gpu: str | None = None
    """Which GPUs they are, as hpcdl.plan.devices names them (`h100`); null: Slurm is asked (gres types)."""
    gpu_mem_gb: Annotated[float, Gt(0)] | None = None
    """Memory of one GPU, in GiB; null: what `gpu` says."""
    time_min: Annotated[int, Ge(1)] | None = None
    """Longest time limit, in minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Placement and resources. Null leaves a setting to the cluster's own default."""

    kind: Literal["local", "slurm", "kubernetes"]
    """`local`: torchrun on this machine; `slurm`: sbatch, detached; `kubernetes`: a Job of pods, detached."""
    nodes: Annotated[int, Ge(1)] = 1
    """Nodes (sbatch --nodes)."""
    min_nodes: Annotated[int, Ge(1)] | None = None
    """The run starts, and goes on after a node was lost, with as few as these (sbatch --nodes=min-max --no-kill);
    null: with all of `nodes` or not at all."""
    processes_per_node: Annotated[int, Ge(1)] = 1
    """Worker processes on each node (torchrun --nproc-per-node)."""
    cpus_per_process: Annotated[int, Ge(1)] = 1
    """CPUs of each worker; a node's task gets processes_per_node times as many (--cpus-per-task)."""
    gpus_per_node: Annotated[int, Ge(0)] = 0
    """GPUs on each node (--gpus-per-node); 0: train on the CPU with gloo."""
    gpu: str | None = None
    """Which GPUs they are (`h100`), for the plan; null: what the partition, --gres or Slurm say."""
    gpu_mem_gb: Annotated[float, Gt(0)] | None = None
    """Memory of one GPU, in GiB, for the plan; null: what is known of such a GPU."""
    mem_gb: Annotated[float, Gt(0)] | None = None
    """Memory of each node, in GiB (--mem)."""
    time_min: Annotated[int, Ge(1)] | None = None
    """Time limit, in minutes (--time)."""
    partition: str | None = None
    """Partition (--partition)."""
    account: str | None = None
    """Account (--account)."""
    qos: str | None = None
    """Quality of service (--qos)."""
    constraint: str | None = None
    """Node features (--constraint)."""
    exclude: str | None = None
    """Nodes to avoid (--exclude)."""
    reservation: str | None = None
    """Reservation (--reservation)."""
    gres: str | None = None
    """Generic resources (--gres), e.g. `gpu:a100:4`, where the site wants them rather than gpus_per_node."""
    signal: str | None = "USR2@120"
    """Signal before the time limit, and how many seconds before (--signal): workers save and stop."""
    setup: tuple[str, ...] = ()
    """Shell lines run on the first node before srun: `module load cuda`, `source env/bin/activate`."""
    teardown: tuple[str, ...] = ()
    """Shell lines run on the first node at the job's end, however it ends; the job's code stays what it was."""
    extra: tuple[str, ...] = ()
    """More #SBATCH options, as they stand: `--mail-type=END`."""
    srun_args: tuple[str, ...] = ()
    """More srun options, as they stand: `--mpi=none`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the workers."""
    python: str | None = None
    """Python on the compute nodes; null: the one that launches."""
    login_host: str | None = None
    """The cluster's login node, `user@host` or a name of ~/.ssh/config: submit there over ssh; null: from here."""
    login_dir: str = "hpcdl-runs"
    """Folder of all runs there, on a disk that every node sees; a relative one counts from the home directory."""
    login_python: str | None = None
    """Python there, with hpcdl's dependencies; null: cluster.python, or else python3 of a login shell."""
    container: Literal["none", "apptainer", "pyxis"] = "none"
    """What the agents and workers of a Slurm job run inside of: `apptainer exec`, or srun's pyxis plug-in."""
    container_image: str | None = None
    """The image. Apptainer: a .sif file, a sandbox folder, docker://…; pyxis: a .sqsh file, REGISTRY#IMAGE:TAG."""
    container_mounts: tuple[str, ...] = ()
    """More of the node's files inside of it: SRC, SRC:DST or SRC:DST:ro, absolute. The folder of the runs, caches, /tmp
    and what the experiment names are there anyway."""
    container_python: str = "python3"
    """Python inside of it."""
    container_args: tuple[str, ...] = ()
    """More options of `apptainer exec`, or of srun for pyxis, as they stand."""
    max_restarts: Annotated[int, Ge(0)] = 3
    """Restarts in place, on the same nodes, after a worker or an agent has died, without progress in a row. A
    fault of the config or the code isn't tried again."""
    max_requeues: Annotated[int, Ge(0)] = 10
    """Times a job that was preempted, timed out or has lost a node starts anew, without progress in a row."""
    requeue: Literal["auto", "requeue", "successor"] = "auto"
    """How a job that ends early goes on: `requeue` puts it back into the queue, where Slurm holds it for two
    minutes; `successor` submits another job that starts when this one has ended; `auto`: a successor, unless
    the job's array is throttled or another job waits for this one."""
    exclude_failed_nodes: bool = True
    """Keep the next try off a node that was lost or failed its preflight (ExcNodeList), where enough are left."""
    lost_after_s: Annotated[float, Ge(5)] = 20.0
    """Silence of a node's agent, in seconds, after which the others take the node for lost."""
    array_parallelism: Annotated[int, Ge(1)] = 100
    """Array tasks that run at a time (the `%` of --array)."""
    max_array_size: Annotated[int, Ge(1)] | None = None
    """Tasks of one array at most; a longer sweep becomes several. Null: the cluster's MaxArraySize, as Slurm says it
    (1001 where it can't be asked)."""
    partitions: dict[str, PartitionLimits] = field(default_factory=dict)
    """What this site's partitions have, by name; checked before submission."""
    kubernetes: KubernetesSpec | None = None
    """What only a Kubernetes cluster is told; null elsewhere."""

    @property
    def world_size(self) -> int:
        """Worker processes over all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def cpus_per_node(self) -> int:
        """CPUs that the task on one node gets."""
        return self.processes_per_node * self.cpus_per_process
