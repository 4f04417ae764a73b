"""Rules of the cluster section: what fits a partition, and what Slurm's options look like."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from hpcdl.errors import Fault, nearest_name
from hpcdl.spec import ClusterSpec, PartitionLimits

SET_BY_KEYS = {
    "--nodes": "cluster.nodes",
    "-N": "cluster.nodes",
    "--cpus-per-task": "cluster.cpus_per_process",
    "-c": "cluster.cpus_per_process",
    "--gpus-per-node": "cluster.gpus_per_node",
    "--gres": "cluster.gres",
    "--mem": "cluster.mem_gb",
    "--time": "cluster.time_min",
    "-t": "cluster.time_min",
    "--partition": "cluster.partition",
    "-p": "cluster.partition",
    "--account": "cluster.account",
    "-A": "cluster.account",
    "--qos": "cluster.qos",
    "-q": "cluster.qos",
    "--constraint": "cluster.constraint",
    "-C": "cluster.constraint",
    "--exclude": "cluster.exclude",
    "-x": "cluster.exclude",
    "--reservation": "cluster.reservation",
    "--signal": "cluster.signal",
    "--array": "cluster.array_parallelism",
    "-a": "cluster.array_parallelism",
    "--dependency": "after",
    "-d": "after",
    "--job-name": "name",
    "-J": "name",
}
"""sbatch options that have a key of their own here."""

SET_BY_HPCDL = frozenset(
    [
        *(
            "--ntasks",
            "-n",
            "--ntasks-per-node",
            "--output",
            "-o",
            "--error",
            "-e",
            "--requeue",
            "--no-requeue",
        ),
        *("--export", "--open-mode", "--kill-on-invalid-dep", "--parsable", "--wrap", "--chdir", "-D"),
        *("--wait", "-W", "--test-only", "--no-kill", "-k"),
    ]
)
"""sbatch options that the job script needs as they are."""

WORDS = ("partition", "account", "qos", "constraint", "exclude", "reservation")


def one_machine_is_one_node(cluster: ClusterSpec) -> Iterator[Fault]:
    """`local` has this machine and no other."""
    if cluster.kind == "local" and cluster.nodes != 1:
        yield Fault(
            key="cluster.nodes",
            value=str(cluster.nodes),
            problem="cluster=local is this machine only",
            allowed="1",
            fix="cluster.nodes=1, or cluster=slurm",
        )


def a_process_a_gpu(cluster: ClusterSpec) -> Iterator[Fault]:
    """With GPUs each process has one; GPUs are asked for once."""
    if cluster.gpus_per_node and cluster.gpus_per_node != cluster.processes_per_node:
        yield Fault(
            key="cluster.processes_per_node",
            value=str(cluster.processes_per_node),
            problem=f"with GPUs each process has one, and cluster.gpus_per_node is {cluster.gpus_per_node}",
            allowed=str(cluster.gpus_per_node),
            fix=f"cluster.processes_per_node={cluster.gpus_per_node}",
        )
    if cluster.gres and cluster.gpus_per_node and re.search(r"(^|,)(gres/)?gpu(:|,|$)", cluster.gres):
        yield Fault(
            key="cluster.gres",
            value=cluster.gres,
            problem=f"asks for GPUs a second time: cluster.gpus_per_node is {cluster.gpus_per_node}",
            allowed="GPUs in one of the two only",
            fix="cluster.gres=null",
        )


def partition_is_known(cluster: ClusterSpec) -> Iterator[Fault]:
    """A profile that says what its partitions have names them all."""
    for name in _partitions(cluster):
        if name not in cluster.partitions:
            near = nearest_name(name, cluster.partitions)
            yield Fault(
                key="cluster.partition",
                value=cluster.partition or "",
                problem=f"this cluster's profile knows no partition {name}",
                allowed=", ".join(cluster.partitions),
                nearest=near,
                fix=f"cluster.partition={near or next(iter(cluster.partitions))}",
            )


def fits_the_partition(cluster: ClusterSpec) -> Iterator[Fault]:
    """No request that the partition can never fill: it would wait for ever."""
    for name in _partitions(cluster):
        if name in cluster.partitions:
            yield from _beyond(cluster, name, cluster.partitions[name])


def _partitions(cluster: ClusterSpec) -> list[str]:
    """The partitions that are asked for, where the profile says what they have."""
    if cluster.kind != "slurm" or not cluster.partitions or cluster.partition is None:
        return []
    return cluster.partition.split(",")


def _beyond(cluster: ClusterSpec, partition: str, limits: PartitionLimits) -> Iterator[Fault]:
    asked: tuple[tuple[str, float | None, float | None, str], ...] = (
        ("nodes", cluster.nodes, limits.nodes, "nodes"),
        ("cpus_per_process", cluster.cpus_per_node, limits.cpus_per_node, "CPUs a node"),
        ("mem_gb", cluster.mem_gb, limits.mem_gb, "GiB of memory a node"),
        ("gpus_per_node", cluster.gpus_per_node, limits.gpus_per_node, "GPUs a node"),
        ("gres", _gpus_in(cluster.gres), limits.gpus_per_node, "GPUs a node"),
        ("time_min", cluster.time_min, limits.time_min, "minutes at most"),
    )
    for key, wanted, limit, unit in asked:
        if wanted is None or limit is None or wanted <= limit:
            continue
        if key == "cpus_per_process":
            yield _too_many_cpus(cluster, partition, int(limit))
            continue
        value = str(getattr(cluster, key))
        fix = f"cluster.{key}={_with_gpus(cluster.gres, int(limit)) if key == 'gres' else f'{limit:g}'}"
        yield Fault(
            key=f"cluster.{key}",
            value=value,
            problem=f"partition {partition} has {limit:g} {unit}",
            allowed=f"at most {limit:g}",
            nearest=fix.partition("=")[2],
            fix=fix,
        )


def _too_many_cpus(cluster: ClusterSpec, partition: str, limit: int) -> Fault:
    processes, each = cluster.processes_per_node, cluster.cpus_per_process
    problem = (
        f"{processes} processes × {each} CPUs = {cluster.cpus_per_node} on a node, and partition "
        f"{partition} has {limit} CPUs a node"
    )
    if processes > limit:
        key, value, fits = "processes_per_node", processes, limit // each or limit
    else:
        key, value, fits = "cpus_per_process", each, limit // processes
    return Fault(
        key=f"cluster.{key}",
        value=str(value),
        problem=problem,
        allowed=f"processes_per_node × cpus_per_process of at most {limit}",
        nearest=str(fits),
        fix=f"cluster.{key}={fits}",
    )


def _gpus_in(gres: str | None) -> int | None:
    """GPUs a node that a --gres asks for: `gpu`, `gpu:2`, `gpu:a100:2`."""
    counts = [
        int(found.group(2) or 1)
        for item in (gres or "").split(",")
        if (found := re.fullmatch(r"(?:gres/)?gpu(:[A-Za-z][\w.-]*)?(?::(\d+))?", item))
    ]
    return sum(counts) or None


def _with_gpus(gres: str | None, count: int) -> str:
    if count == 0:
        return "null"
    return re.sub(r"(gpu(?::[A-Za-z][\w.-]*)?)(:\d+)?", rf"\g<1>:{count}", gres or "", count=1)


def slurm_understands(cluster: ClusterSpec) -> Iterator[Fault]:
    """Settings whose form Slurm prescribes."""
    for key in WORDS:
        value = getattr(cluster, key)
        if value is not None and not re.fullmatch(r"[^\s\"'`$\\;#]+", value):
            yield Fault(
                key=f"cluster.{key}",
                value=value or '""',
                problem="is no single word as Slurm wants it",
                allowed="text without spaces and quotes, or null",
                fix=f"cluster.{key}=null",
            )
    gres = cluster.gres
    if gres is not None and not re.fullmatch(r"[\w/.-]+(:[\w.-]+){0,2}(,[\w/.-]+(:[\w.-]+){0,2})*", gres):
        yield Fault(
            key="cluster.gres",
            value=gres or '""',
            problem="is not what --gres takes",
            allowed="NAME[:TYPE][:COUNT], several with commas: gpu:2 or gpu:a100:4; or null",
            fix="cluster.gres=gpu:1",
        )
    signal = cluster.signal
    if signal is not None and not re.fullmatch(r"(SIG)?(USR2|TERM|INT)@([1-9]\d{0,3}|[1-5]\d{4})", signal):
        hint = "workers must get it, not only the batch shell: leave out B:" if "B:" in signal else ""
        yield Fault(
            key="cluster.signal",
            value=signal or '""',
            problem=hint or "is not a signal that workers act on, with its seconds before the time limit",
            allowed="USR2, TERM or INT, @, seconds: USR2@120; or null",
            fix="cluster.signal=USR2@120",
        )
    elif signal is not None and cluster.time_min and int(signal.partition("@")[2]) >= cluster.time_min * 60:
        yield Fault(
            key="cluster.signal",
            value=signal,
            problem=f"comes before the job has started: the time limit is {cluster.time_min} min",
            allowed=f"fewer than {cluster.time_min * 60} seconds",
            fix=f"cluster.signal={signal.partition('@')[0]}@{max(1, cluster.time_min * 60 // 4)}",
        )


def output_has_a_name(runs_dir: str, cluster: ClusterSpec) -> Iterator[Fault]:
    """With a backslash in it Slurm takes an output file's name as it stands, without the job's number, or fails."""
    if cluster.kind == "slurm" and "\\" in os.path.abspath(os.path.expanduser(runs_dir)):  # noqa: PTH100, PTH111
        yield Fault(
            key="runs_dir",
            value=runs_dir,
            problem="has a backslash in its path, and Slurm can't write a job's output there",
            allowed="a path without backslashes",
            fix="runs_dir=runs, in a folder without one",
        )


def extra_is_extra(cluster: ClusterSpec) -> Iterator[Fault]:
    """Raw options don't say again, and otherwise, what hpcdl says already."""
    for index, line in enumerate(cluster.extra):
        key = f"cluster.extra.{index}"
        option = re.split(r"[=\s]", line.strip(), maxsplit=1)[0]
        if option in SET_BY_KEYS:
            yield Fault(
                key=key,
                value=line,
                problem=f"{option} has a key of its own",
                allowed="options that have no key here",
                nearest=SET_BY_KEYS[option],
                fix=f"{SET_BY_KEYS[option]}=…",
            )
        elif option in SET_BY_HPCDL:
            problem = f"hpcdl sets {option} itself, and relies on it"
            yield Fault(key=key, value=line, problem=problem, fix="leave it out")
        elif not option.startswith("-"):
            yield Fault(
                key=key,
                value=line or '""',
                problem="is no option",
                allowed="an sbatch option as it stands: --mail-type=END",
                fix=f"'cluster.extra=[--{option or 'option'}]'",
            )


def lines_are_lines(cluster: ClusterSpec) -> Iterator[Fault]:
    """What becomes a line of the job script has no line break, or it would be two."""
    for name in ("setup", "teardown", "extra", "srun_args"):
        for index, line in enumerate(getattr(cluster, name)):
            if re.search(r"[\x00-\x08\x0a-\x1f]", line):
                yield Fault(
                    key=f"cluster.{name}.{index}",
                    value=line.replace("\n", "\\n"),
                    problem="holds a line break or another control character",
                    allowed="one line an item",
                    fix=f"cluster.{name}: give each line as an item of its own",
                )
    for name, value in cluster.env.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield Fault(
                key=f"cluster.env.{name}",
                value=value,
                problem="is no name of an environment variable",
                allowed="letters, digits and underscore, no digit first",
                fix=f"cluster.env.{re.sub(r'[^A-Za-z0-9_]', '_', name)}={value}",
            )
        elif re.search(r"[\x00-\x08\x0a-\x1f]", value):
            problem = "holds a line break or another control character"
            yield Fault(key=f"cluster.env.{name}", value=value, problem=problem, fix="leave it out")
    python = cluster.python
    if python is not None and (not python.strip() or re.search(r"[\x00-\x1f]|^-", python)):
        yield Fault(
            key="cluster.python",
            value=repr(python),
            problem="is no path of a Python",
            allowed="a path or a command, or null for the Python that launches",
            fix="cluster.python=null",
        )
