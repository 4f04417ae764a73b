"""Rules of the container that a Slurm job runs inside of (cluster.container, hpcdl.launch.containers)."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hpcdl.errors import Fault, nearest_name
from hpcdl.spec import ClusterSpec
from hpcdl.spec.container import PLUGIN_CUTS, Mount

IMAGES = {
    "apptainer": "the path of a .sif file or of a sandbox folder, or docker://IMAGE:TAG",
    "pyxis": "the path of a .sqsh file, or [REGISTRY#]IMAGE:TAG",
}
_SCHEME = re.compile(r"(docker|docker-archive|docker-daemon|oci|oci-archive|oras|library|shub|http|https)://")
_SET_BY_HPCDL = {
    "apptainer": {
        **dict.fromkeys(("--bind", "-B", "--mount"), "cluster.container_mounts"),
        **dict.fromkeys(("--nv", "--nvccli"), "cluster.gpus_per_node"),
        **dict.fromkeys(("--pwd", "--cwd", "--no-mount", "--home", "-H", "--pid", "-p", "--net", "-n"), ""),
    },
    "pyxis": {
        "--container-image": "cluster.container_image",
        "--container-mounts": "cluster.container_mounts",
        **dict.fromkeys(("--container-workdir", "--container-env", "--container-entrypoint"), ""),
        **dict.fromkeys(("--container-mount-home", "--container-remap-root"), ""),
    },
}
"""Options that the job needs as they are, by container; and the key to use instead, where there is one."""


def resolve(cluster: ClusterSpec) -> tuple[ClusterSpec, list[Fault]]:
    """The cluster with its image's path absolute; a fault where nothing is there. What lies behind a login node isn't
    looked at from here.
    """
    image = cluster.container_image
    if (
        cluster.container == "none"
        or not image
        or not is_path(cluster.container, image)
        or cluster.login_host
    ):
        return cluster, []
    path = Path(os.path.abspath(os.path.expanduser(image)))  # noqa: PTH100, PTH111 (a link may be changed later)
    if path.exists():
        return dataclasses.replace(cluster, container_image=str(path)), []
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        beside = []
    near = nearest_name(path.name, beside)
    fix = f"cluster.container_image={path.parent / near if near else '/path/of/the/image'}"
    return cluster, [
        Fault(
            key="cluster.container_image",
            value=image,
            problem="there is no such image" if path.parent.is_dir() else f"there is no folder {path.parent}",
            allowed=IMAGES[cluster.container],
            nearest=near,
            fix=fix,
        )
    ]


def is_path(container: str, image: str) -> bool:
    """Whether an image is a file or a folder here, and not a name in a registry."""
    if container == "apptainer":
        return not _SCHEME.match(image)
    return image.startswith(("/", "./", "../", "~")) or image.endswith((".sqsh", ".squashfs"))


def a_container_is_slurms(cluster: ClusterSpec) -> Iterator[Fault]:
    """`local` starts its workers from this very Python, pods are containers already; and no key waits in vain."""
    if cluster.container != "none" and cluster.kind != "slurm":
        local = "start hpcdl itself inside of it (apptainer exec IMAGE hpcdl launch …)"
        yield Fault(
            key="cluster.container",
            value=cluster.container,
            problem=f"only Slurm's jobs are put into a container by it, and this is cluster={cluster.kind}",
            allowed="none",
            fix=f"cluster.container=none, and {local}"
            if cluster.kind == "local"
            else "cluster.container=none; a pod's image is cluster.kubernetes.image",
        )
    if cluster.container != "none":
        return
    for key in ("container_image", "container_mounts", "container_args"):
        value = getattr(cluster, key)
        if value:
            yield Fault(
                key=f"cluster.{key}",
                value=value if isinstance(value, str) else ", ".join(value),
                problem="nothing would use it: cluster.container is none",
                allowed="null" if key == "container_image" else "[]",
                fix="cluster.container=apptainer or cluster.container=pyxis"
                if cluster.kind == "slurm"
                else f"cluster.{key}={'null' if key == 'container_image' else '[]'}",
            )


def an_image_is_one(cluster: ClusterSpec) -> Iterator[Fault]:
    """Each container has its own kinds of images."""
    if cluster.container == "none":
        return
    key, image, allowed = "cluster.container_image", cluster.container_image, IMAGES[cluster.container]
    example = "/shared/train.sif" if cluster.container == "apptainer" else "/shared/train.sqsh"
    if image is None or not image.strip():
        yield Fault(
            key=key,
            value="" if image is None else '""',
            problem=f"cluster.container={cluster.container} needs an image",
            allowed=allowed,
            fix=f"cluster.container_image={example}",
        )
    elif re.search(r"[\x00-\x1f]|^-", image):
        yield Fault(key=key, value=image, problem="is no image", allowed=allowed, fix=f"{key}={example}")
    elif cluster.container == "apptainer" and image.endswith((".sqsh", ".squashfs")):
        problem = "is an image of enroot's, which is pyxis's"
        yield Fault(key=key, value=image, problem=problem, allowed=allowed, fix="cluster.container=pyxis")
    elif cluster.container == "pyxis" and image.endswith(".sif"):
        problem = "is an image of apptainer's"
        yield Fault(key=key, value=image, problem=problem, allowed=allowed, fix="cluster.container=apptainer")
    elif cluster.container == "pyxis" and (found := _SCHEME.match(image)):
        # enroot's own form: docker://registry.example.org/team/train:1 is registry.example.org#team/train:1
        host, slash, rest = image[found.end() :].partition("/")
        near = f"{host}#{rest}" if slash and re.search(r"[.:]", host) else image[found.end() :]
        problem = f"{found.group()} is apptainer's way to say it"
        yield Fault(
            key=key, value=image, problem=problem, allowed=allowed, nearest=near, fix=f"'{key}={near}'"
        )


def mounts_are_mounts(cluster: ClusterSpec) -> Iterator[Fault]:
    """SRC, SRC:DST or SRC:DST:ro; one thing at a place."""
    taken: dict[str, str] = {}
    for index, text in enumerate(cluster.container_mounts):
        key, mount = f"cluster.container_mounts.{index}", Mount.parse(text)
        if mount is None:
            yield Fault(
                key=key,
                value=text or '""',
                problem="is no mount",
                allowed="SRC, SRC:DST or SRC:DST:ro, both absolute paths",
                fix=f"'cluster.container_mounts=[{_as_mount(text)}]'",
            )
            continue
        if mount.target in taken:
            problem = f"{taken[mount.target]} is shown at {mount.target} already"
            yield Fault(key=key, value=text, problem=problem, fix="leave one of the two out")
        taken[mount.target] = text
        if cluster.container == "pyxis" and (
            PLUGIN_CUTS.search(mount.source) or PLUGIN_CUTS.search(mount.target)
        ):
            problem = "pyxis ends a path at a space, a comma or a colon"
            yield Fault(
                key=key, value=text, problem=problem, fix="a link without one, or cluster.container=apptainer"
            )


def _as_mount(text: str) -> str:
    """What may have been meant by something that is no mount."""
    path = os.path.expanduser(text)  # noqa: PTH111
    return path if Mount.parse(path) else "/data:/data:ro"


def runs_can_be_shown(runs_dir: str, cluster: ClusterSpec) -> Iterator[Fault]:
    """Pyxis has no way to write some paths."""
    path = os.path.abspath(os.path.expanduser(runs_dir))  # noqa: PTH100, PTH111
    if cluster.container == "pyxis" and PLUGIN_CUTS.search(path):
        yield Fault(
            key="runs_dir",
            value=runs_dir,
            problem="pyxis can't show this folder: it ends a path at a space, a comma or a colon",
            allowed="a path without them",
            fix="runs_dir=/path/without/spaces, or cluster.container=apptainer",
        )


def options_are_the_containers(cluster: ClusterSpec) -> Iterator[Fault]:
    """Options as they stand don't say again, and otherwise, what hpcdl says already."""
    known = _SET_BY_HPCDL.get(cluster.container, {})
    for index, text in enumerate(cluster.container_args):
        key, option = f"cluster.container_args.{index}", text.partition("=")[0].strip()
        if re.search(r"[\x00-\x1f]", text):
            problem = "holds a line break or another control character"
            yield Fault(key=key, value=repr(text), problem=problem, fix="leave it out")
        elif option in known:
            instead = known[option]
            problem = (
                f"{option} has a key of its own"
                if instead
                else f"hpcdl sets {option} itself, and relies on it"
            )
            yield Fault(
                key=key,
                value=text,
                problem=problem,
                nearest=instead,
                fix=f"{instead}=…" if instead else "leave it out",
            )
        elif not text.startswith("-") and (index == 0 or cluster.container == "pyxis"):
            of = "srun" if cluster.container == "pyxis" else "apptainer exec"
            yield Fault(
                key=key,
                value=text or '""',
                problem="is no option",
                allowed=f"an option of {of} as it stands, `--name=value`",
                fix=f"'cluster.container_args=[--{text or 'option'}]'",
            )
    for name in ("srun_args", "extra"):
        for index, text in enumerate(getattr(cluster, name)):
            if text.startswith(("--container-", "--no-container-")):
                problem = (
                    f"{text.partition('=')[0]} is cluster.container's to say: the agent must be told, too"
                )
                fix = "cluster.container=pyxis cluster.container_image=…"
                yield Fault(
                    key=f"cluster.{name}.{index}",
                    value=text,
                    problem=problem,
                    nearest="cluster.container",
                    fix=fix,
                )


def python_is_inside(cluster: ClusterSpec) -> Iterator[Fault]:
    """A path in the image, or a name on its PATH."""
    python = cluster.container_python
    if not python.strip() or re.search(r"[\x00-\x1f]|^-", python):
        yield Fault(
            key="cluster.container_python",
            value=repr(python),
            problem="is no path of a Python",
            allowed="a path inside of the image, or a command on its PATH",
            fix="cluster.container_python=python3",
        )


RULES = (
    a_container_is_slurms,
    an_image_is_one,
    mounts_are_mounts,
    options_are_the_containers,
    python_is_inside,
)
"""Of the cluster section alone; `runs_can_be_shown` needs runs_dir, too."""
