"""Slurm jobs in containers: what srun starts on each node is inside of one; the batch script stays outside.

    outside, on the first node                      inside, on each node
    slurm/torchrun.sbatch                           python3 -m hpcdl.launch.job: the agent, and below it
    python -m hpcdl.launch.steps: srun              torchrun and the workers
    Slurm's commands (hpcdl.runs.outside)  <------  sbatch, scontrol, squeue of the agent

`apptainer`: srun starts `apptainer exec … IMAGE python3 -m hpcdl.launch.job`. `pyxis`: srun itself makes the container
(`--container-image`) and starts `python3 -m hpcdl.launch.job` in it. Signals reach the agent either way, which is a
process of the step. Files that the run needs have the same path inside; the home directory isn't there, since packages
in ~/.local would go before the image's own.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl import secrets
from hpcdl.launch.secret_file import VARIABLE as SECRETS
from hpcdl.spec.container import Mount
from hpcdl.spec.plain import to_plain

if TYPE_CHECKING:
    from hpcdl.launch.base import JobRequest
    from hpcdl.spec import ClusterSpec, ExperimentSpec

SCRATCH = "/tmp"
CACHES = {"HF_HOME": "~/.cache/huggingface", "HPCDL_CACHE": "~/.cache/hpcdl"}
"""Variables that name a cache, and where it is without them."""
HANDED_IN = ("PYTHONNOUSERSITE", "TMPDIR", *CACHES)
"""Set by `environment`; pyxis would let the image's own value win over ours."""
CODE = ("HPCDL_CODE", "PYTHONPATH", "PYTHONSAFEPATH")
GPUS = ("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES")
"""What makes enroot's hook bring the driver in, in an image that doesn't say so itself."""
_OF_THE_HOST = ("PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "VIRTUAL_ENV", "LD_PRELOAD")
"""Would make the image's Python look for what is outside."""
_GLOB = re.compile(r"[*?\[]")


def mounts(
    cluster: ClusterSpec, runs_dir: Path, specs: Iterable[ExperimentSpec], environment: Mapping[str, str]
) -> tuple[Mount, ...]:
    """What the container shows; a later one may lie inside of an earlier one. None where there is no container.

    Args:
        cluster: which container, and the user's own mounts, which go before ours.
        runs_dir: the folder of all runs; the copy of the code is in it.
        specs: the experiments: every file that they name is there.
        environment: the launcher's: where caches and the file of secrets are.
    """
    if cluster.container == "none":
        return ()
    own = [mount for mount in map(Mount.parse, cluster.container_mounts) if mount is not None]
    found = [Mount.of(str(runs_dir)), Mount.of(SCRATCH)]
    found += [Mount.of(str(_place(environment, name)), made=True) for name in CACHES]
    named = Path(environment.get(SECRETS) or secrets.FILE).expanduser()
    if named.is_file():
        found.append(Mount.of(str(named.absolute()), read_only=True))
    kept = list(own)
    for mount in (*found, *(Mount.of(path, read_only=True) for spec in specs for path in _files(spec))):
        taken = any(mount.target == other.target or other.shows(mount.source) for other in kept)
        if not taken:
            kept.append(mount)
    return tuple(sorted(kept, key=lambda mount: mount.target.count("/")))


def _place(environment: Mapping[str, str], name: str) -> Path:
    return Path(environment.get(name) or CACHES[name]).expanduser().absolute()


def _files(spec: ExperimentSpec) -> Iterator[str]:
    """Absolute paths in an experiment that are there: model, texts, adapter, teacher; of a glob the folder."""
    plain = {name: part for name, part in to_plain(spec).items() if name != "cluster"}
    for text in _texts(plain):
        if not text.startswith("/") or "\0" in text:
            continue
        path = Path(text)
        while _GLOB.search(str(path)):
            path = path.parent
        if path != Path("/") and os.path.lexists(path):
            yield str(path)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def make_caches(request: JobRequest) -> None:
    """Makes what the container shows and isn't there: a mount of nothing would end the job."""
    for mount in request.mounts:
        if mount.made:
            Path(mount.source).mkdir(parents=True, exist_ok=True)


def program(request: JobRequest) -> tuple[str, ...]:
    """What srun starts in place of the Python outside; `-m hpcdl.launch.job …` follows. Empty without a container."""
    cluster = request.cluster
    if cluster.container == "apptainer":
        return (*_apptainer(request), _image(cluster), cluster.container_python)
    return (cluster.container_python,) if cluster.container == "pyxis" else ()


def _apptainer(request: JobRequest) -> tuple[str, ...]:
    cluster = request.cluster
    gpus = ["--nv"] if _has_gpus(cluster) and "--rocm" not in cluster.container_args else []
    shown = (f"--mount={_fields(mount)}" for mount in request.mounts)
    options = ("--no-mount=home,cwd", f"--pwd={request.runs_dir}", *gpus, *shown, *cluster.container_args)
    return ("apptainer", "exec", *options)


def _fields(mount: Mount) -> str:
    """A mount as apptainer's --mount takes it: a line of CSV, so that any path can be written."""
    line = io.StringIO()
    fields = ["type=bind", f"source={mount.source}", f"destination={mount.target}"]
    csv.writer(line, lineterminator="").writerow([*fields, *(["ro"] if mount.read_only else [])])
    return line.getvalue()


def srun_args(request: JobRequest) -> tuple[str, ...]:
    """Options of srun that make the container: pyxis's own, none for the others."""
    cluster = request.cluster
    if cluster.container != "pyxis":
        return ()
    shown = ",".join(f"{m.source}:{m.target}{':ro' if m.read_only else ''}" for m in request.mounts)
    names = [*(CODE if request.code else ()), *HANDED_IN, *(GPUS if _has_gpus(cluster) else ())]
    return (
        f"--container-image={_image(cluster)}",
        f"--container-mounts={shown}",
        f"--container-workdir={request.runs_dir}",
        f"--container-env={','.join(names)}",
        "--no-container-mount-home",
        "--no-container-remap-root",
        "--no-container-entrypoint",
        *cluster.container_args,
    )


def _image(cluster: ClusterSpec) -> str:
    assert cluster.container_image is not None  # a rule's (hpcdl.experiment.containers)
    return cluster.container_image


def _has_gpus(cluster: ClusterSpec) -> bool:
    return (
        bool(cluster.gpus_per_node) or re.search(r"(^|,)(gres/)?gpu(:|,|$)", cluster.gres or "") is not None
    )


def environment(outside: Mapping[str, str]) -> dict[str, str]:
    """The environment that is handed in: the job's, less what belongs to the Python outside."""
    kept = {name: value for name, value in outside.items() if name not in (*_OF_THE_HOST, "PYTHONPATH")}
    code = {"PYTHONPATH": outside["HPCDL_CODE"]} if outside.get("HPCDL_CODE") else {}
    caches = {name: str(_place(outside, name)) for name in CACHES}
    gpus = dict(zip(GPUS, ("all", "compute,utility"), strict=True))
    return {**gpus, **kept, **code, **caches, "PYTHONNOUSERSITE": "1", "TMPDIR": SCRATCH}
