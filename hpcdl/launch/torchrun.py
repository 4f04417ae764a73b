"""The torchrun command and its environment: pure functions of what spec.yaml says.

One torchrun a node. It runs with SIGUSR2, SIGTERM and SIGINT ignored (see hpcdl.launch.child), so it must not
install handlers of its own for them: `--signals-to-handle` names SIGQUIT only, which nobody sends.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import yaml

from hpcdl.launch.voices import PREFIX
from hpcdl.runs.store import RunDir

MODULE = "torch.distributed.run"
"""What the console script `torchrun` calls; with `python -m` it is the right environment's."""
WORKER: tuple[str, ...] = ("-m", "hpcdl.worker.main")
"""What torchrun starts on each rank; the run directory follows."""
LOOPBACK = "127.0.0.1"
JOIN_TIMEOUT_S = 600
"""How long an agent waits for the others: importing torch from a slow shared disk can take minutes."""

_INHERITED = ("MASTER_", "TORCHELASTIC_", "TORCH_ELASTIC_", "PET_", "GROUP_", "ROLE_")
_INHERITED_NAMES = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "HPCDL_TRY"})


class Resources(Protocol):
    """What of a ClusterSpec matters on a node."""

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        ...

    @property
    def processes_per_node(self) -> int:
        """Workers on each."""
        ...

    @property
    def cpus_per_process(self) -> int:
        """CPUs of each worker."""
        ...

    @property
    def max_restarts(self) -> int:
        """Restarts in place."""
        ...

    @property
    def env(self) -> Mapping[str, str]:
        """The user's variables."""
        ...


@dataclass(frozen=True, slots=True)
class NodeResources:
    """A ClusterSpec as the agent reads it from spec.yaml, without importing the spec: that takes 40 ms."""

    nodes: int
    min_nodes: int | None
    processes_per_node: int
    cpus_per_process: int
    max_restarts: int
    max_requeues: int
    exclude_failed_nodes: bool
    lost_after_s: float
    requeue: Literal["auto", "requeue", "successor"]
    env: Mapping[str, str]

    @classmethod
    def of(cls, cluster: Mapping[str, Any]) -> NodeResources:
        """From the `cluster` section, every key of which was written by the launcher."""
        return cls(*(cluster[name] for name in cls.__dataclass_fields__))


def resources(run: RunDir) -> NodeResources:
    """The `cluster` section of a run's spec.yaml."""
    return NodeResources.of(plain_spec(run)["cluster"])


def plain_spec(run: RunDir) -> dict[str, Any]:
    """A run's spec.yaml as plain data."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    plain: dict[str, Any] = yaml.load(run.spec_file.read_text(encoding="utf-8"), Loader=loader)
    return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the agents of one job meet."""

    id: str
    """The job's own id and try: two jobs, or two tries of one, never meet."""
    host: str
    """Address of the head node, which holds the store."""
    port: int
    """0: a free one, chosen by torchrun (one node only: nobody else has to know it)."""
    is_head: bool
    """Whether this node is the head. Said outright: torchrun would compare host names, which may differ."""
    local_address: str
    """This node's address, as the others reach it."""


def alone(rendezvous_id: str) -> Rendezvous:
    """The rendezvous of a job on one node: c10d on a free loopback port, no name is looked up."""
    return Rendezvous(id=rendezvous_id, host=LOOPBACK, port=0, is_head=True, local_address=LOOPBACK)


def command(
    cluster: Resources,
    python: str,
    rendezvous: Rendezvous,
    log_dir: str,
    worker: Sequence[str],
) -> list[str]:
    """The argv of torchrun on one node.

    Args:
        cluster: nodes, processes and restarts.
        python: interpreter of torchrun and the workers.
        rendezvous: where the agents meet.
        log_dir: folder for torchrun's own copies of the workers' output, on the node's own disk.
        worker: what each rank runs: a script or `-m module`, and its arguments.
    """
    return [
        python,
        "-m",
        MODULE,
        f"--nnodes={cluster.nodes}",
        f"--nproc-per-node={cluster.processes_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={rendezvous.id}",
        f"--rdzv-endpoint={_endpoint(rendezvous)}",
        f"--rdzv-conf=is_host={int(rendezvous.is_head)},join_timeout={JOIN_TIMEOUT_S},"
        f"read_timeout={JOIN_TIMEOUT_S}",
        f"--local-addr={rendezvous.local_address}",
        f"--max-restarts={cluster.max_restarts}",
        "--signals-to-handle=SIGQUIT",
        "--tee=3",
        f"--log-dir={log_dir}",
        *worker,
    ]


def _endpoint(rendezvous: Rendezvous) -> str:
    host = f"[{rendezvous.host}]" if ":" in rendezvous.host else rendezvous.host
    return f"{host}:{rendezvous.port}"


def environment(cluster: Resources, attempt: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of torchrun and the workers.

    Args:
        cluster: CPUs of a process, nodes, and the user's own variables, which go before all others.
        attempt: HPCDL_TRY, `<attempt>.<requeue>`.
        inherited: this process's environment. What another torchrun left in it (a launch from inside a
            run) is dropped.
    """
    kept = {
        key: value
        for key, value in inherited.items()
        if key not in _INHERITED_NAMES and not key.startswith(_INHERITED)
    }
    settings = {
        "HPCDL_TRY": attempt,
        "OMP_NUM_THREADS": str(cluster.cpus_per_process),
        "PYTHONFAULTHANDLER": "1",  # where Python was when C code crashed
        # torchrun's thread that passes a worker's lines on would die of a letter that the locale doesn't have.
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "PYTHONUNBUFFERED": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": PREFIX,
    }
    if cluster.nodes > 1:
        # With torchrun's store shared with the workers, a restart of several agents hangs or ends in
        # «connectFullMesh failed».
        settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return {**kept, **settings, **cluster.env}


def preview(cluster: Resources, python: str) -> str:
    """The command as a dry run shows it, with words where only the job will know."""
    meeting = Rendezvous(id="JOB_ID", host="HEAD", port=0, is_head=True, local_address="THIS_NODE")
    argv = command(cluster, python, alone("JOB_ID") if cluster.nodes == 1 else meeting, "TMP", WORKER)
    shown = [a.replace("HEAD:0", "HEAD:PORT").replace("is_host=1,", "is_host=FIRST_NODE,") for a in argv]
    return " ".join(shlex.quote(a) for a in (*(shown if cluster.nodes > 1 else argv), "RUN_DIR"))
