"""Rules of `cluster=kubernetes`: what is needed, what names look like there, and which of Slurm's keys mean nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpcdl.errors import Fault
from hpcdl.spec import ClusterSpec
from hpcdl.spec.kubernetes import KubernetesSpec

SLURMS = {
    "partition": "cluster.kubernetes.queue=…, or cluster.kubernetes.node_selector",
    "account": "cluster.kubernetes.queue=…",
    "qos": "cluster.kubernetes.priority_class=…",
    "constraint": "cluster.kubernetes.node_selector",
    "exclude": "cluster.kubernetes.node_selector",
    "reservation": "cluster.kubernetes.node_selector",
    "gres": "cluster.gpus_per_node=…, cluster.kubernetes.gpu_resource=…",
    "signal": "leave it out: cluster.kubernetes.grace_s is what a pod has to save in",
    "extra": "cluster.kubernetes.labels, annotations",
    "srun_args": "leave it out",
    "teardown": "leave it out",
    "partitions": "leave it out",
}
"""Keys that only Slurm's jobs have, and what does their work here."""
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
LABEL = re.compile(_LABEL)
"""A DNS label (RFC 1123): namespaces, and each part of a name."""
NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
"""A DNS subdomain: claims, secrets, classes."""
KEY = re.compile(
    rf"(?:(?=[^/]{{1,253}}/){_LABEL}(?:\.{_LABEL})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?"
)
"""A label's or an annotation's key, and a resource's name."""
VALUE = re.compile(r"|[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""A label's value."""
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[KMGTPE]i?)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OURS = re.compile(r"(app\.kubernetes\.io/(name|managed-by)|hpcdl/.*|kueue\.x-k8s\.io/queue-name)")
"""Labels that the launcher sets itself."""
_NAMES = ("namespace", "runs_claim", "service_account", "priority_class", "scheduler", "queue", "runtime")


def section_is_there(cluster: ClusterSpec) -> Iterator[Fault]:
    """`cluster.kubernetes` goes with `kind: kubernetes`, and only with it."""
    if cluster.kind == "kubernetes" and cluster.kubernetes is None:
        yield Fault(
            key="cluster.kubernetes",
            value="null",
            problem="is needed by cluster.kind=kubernetes",
            allowed="the keys of conf/cluster/kubernetes.yaml",
            fix="cluster=kubernetes, or a file of your own that begins with defaults: [kubernetes]",
        )
    elif cluster.kind != "kubernetes" and cluster.kubernetes is not None:
        yield Fault(
            key="cluster.kubernetes",
            value="…",
            problem=f"means nothing to cluster.kind={cluster.kind}",
            allowed="null",
            fix="cluster=kubernetes",
        )


def what_is_needed(cluster: ClusterSpec) -> Iterator[Fault]:
    """An image to run, and a volume that all pods and the next try can read."""
    kube = cluster.kubernetes
    if cluster.kind != "kubernetes" or kube is None:
        return
    if not (kube.image or "").strip():
        yield _fault(
            "image", kube.image, "pods need a container image with hpcdl and torch in it",
            "REGISTRY/NAME:TAG", "cluster.kubernetes.image=registry.example.org/hpcdl-train:0.1 (docs/kubernetes.md)",
        )  # fmt: skip
    elif re.search(r"\s", kube.image or ""):
        yield _fault("image", kube.image, "is no image's name", "REGISTRY/NAME:TAG", "leave out the spaces")
    if not kube.runs_claim:
        yield _fault(
            "runs_claim", kube.runs_claim, "runs need a volume that all pods mount, and that stays after them",
            "the name of a PersistentVolumeClaim (ReadWriteMany)", "cluster.kubernetes.runs_claim=hpcdl-runs",
        )  # fmt: skip


def no_keys_of_slurms(cluster: ClusterSpec) -> Iterator[Fault]:
    """What only Slurm understands would be silently lost."""
    if cluster.kind != "kubernetes":
        return
    for name, instead in SLURMS.items():
        value = getattr(cluster, name)
        if value:
            yield Fault(
                key=f"cluster.{name}",
                value=str(value) if isinstance(value, str) else "…",
                problem="is Slurm's, and means nothing to Kubernetes",
                allowed="null" if isinstance(value, str) else "none",
                fix=instead,
            )
    if cluster.requeue == "successor":
        yield Fault(
            key="cluster.requeue",
            value="successor",
            problem="is Slurm's: a Job makes its pods anew by itself",
            allowed="auto",
            fix="cluster.requeue=auto",
        )


def names_are_names(cluster: ClusterSpec) -> Iterator[Fault]:
    """What becomes a name, a label or a quantity is one: the API server would refuse it after the launch."""
    kube = cluster.kubernetes
    if cluster.kind != "kubernetes" or kube is None:
        return
    for key in _NAMES:
        value = getattr(kube, key)
        pattern = LABEL if key == "namespace" else NAME
        if value is not None and not (key == "runs_claim" and not value) and not pattern.fullmatch(value):
            yield _no_name(key, value)
    for index, value in enumerate(kube.image_pull_secrets):
        if not NAME.fullmatch(value):
            yield _no_name(f"image_pull_secrets.{index}", value)
    yield from _maps(kube)
    yield from _secrets(kube)
    yield from _volumes(kube)
    yield from _tolerations(kube)


def a_runtime_has_its_own(cluster: ClusterSpec) -> Iterator[Fault]:
    """What a TrainJob can't say: its runtime does."""
    kube = cluster.kubernetes
    if cluster.kind != "kubernetes" or kube is None or kube.resource != "trainjob":
        return
    for key in ("priority_class", "scheduler", "image_pull_policy"):
        if getattr(kube, key) is not None:
            yield _fault(
                key, getattr(kube, key), "can't be said in a TrainJob: its runtime says it", "null",
                f"cluster.kubernetes.{key}=null, and set it in the ClusterTrainingRuntime {kube.runtime}",
            )  # fmt: skip


RULES = (
    section_is_there,
    what_is_needed,
    no_keys_of_slurms,
    names_are_names,
    a_runtime_has_its_own,
)
"""All of them; each needs the cluster's section only, and is broken by a value by itself."""


def _maps(kube: KubernetesSpec) -> Iterator[Fault]:
    for key in ("labels", "annotations", "node_selector", "resources"):
        for name, value in getattr(kube, key).items():
            where = f"{key}.{name}"
            if not KEY.fullmatch(name):
                allowed = "[PREFIX/]NAME: letters, digits, - _ and ."
                yield _fault(where, value, "is no key of Kubernetes'", allowed, "another name")
            elif key in ("labels", "annotations") and OURS.fullmatch(name):
                yield _fault(where, value, "is set by hpcdl itself", "other keys", "leave it out")
            elif key in ("labels", "node_selector") and not VALUE.fullmatch(value):
                allowed = "at most 63 letters, digits, - _ and ."
                yield _fault(where, value, "is no value of a label", allowed, "another value")
            elif key == "resources" and not QUANTITY.fullmatch(value):
                fix = f"cluster.kubernetes.{where}=1"
                yield _fault(
                    where, value, "is no quantity", "a number, with a unit where it has one: 1, 16Gi", fix
                )
            elif key == "resources" and name in ("cpu", "memory", kube.gpu_resource):
                own = {"cpu": "cluster.cpus_per_process", "memory": "cluster.mem_gb"}
                has = own.get(name, "cluster.gpus_per_node")
                yield _fault(where, value, "has a key of its own", "other resources", f"{has}=…")
    if not KEY.fullmatch(kube.gpu_resource):
        yield _fault(
            "gpu_resource",
            kube.gpu_resource,
            "is no resource's name",
            "nvidia.com/gpu, amd.com/gpu",
            "nvidia.com/gpu",
        )


def _secrets(kube: KubernetesSpec) -> Iterator[Fault]:
    for name, value in kube.secrets.items():
        secret, _, key = value.partition("/")
        if not VARIABLE.fullmatch(name):
            yield _fault(
                f"secrets.{name}",
                value,
                "is no name of an environment variable",
                "letters, digits and underscore",
                "another name",
            )
        elif not NAME.fullmatch(secret) or not re.fullmatch(r"[-._a-zA-Z0-9]+", key):
            # Not shown: it may be the secret itself.
            problem = "is no reference to a secret of the cluster"
            make = "kubectl create secret generic NAME --from-literal=KEY=…"
            fix = f"{make}, then cluster.kubernetes.secrets.{name}=NAME/KEY"
            yield _fault(f"secrets.{name}", "…", problem, "SECRET/KEY, never the value itself", fix)


def _volumes(kube: KubernetesSpec) -> Iterator[Fault]:
    taken = {kube.runs_mount.rstrip("/"), "/etc/hpcdl", "/dev/shm"}
    if not re.fullmatch(r"(/[\w.-]+)+", kube.runs_mount) or kube.runs_mount in ("/etc/hpcdl", "/dev/shm"):
        yield _fault(
            "runs_mount",
            kube.runs_mount,
            "is no path where a volume can be mounted",
            "a path of its own: /runs",
            "cluster.kubernetes.runs_mount=/runs",
        )
    sub = kube.runs_sub_path
    if sub is not None and (not sub or sub.startswith("/") or ".." in sub.split("/")):
        yield _fault(
            "runs_sub_path",
            sub or '""',
            "is no path within the volume",
            "a relative path without ..",
            "cluster.kubernetes.runs_sub_path=null",
        )
    for path, value in kube.claims.items():
        claim, _, how = value.partition(":")
        if not re.fullmatch(r"(/[\w.-]+)+", path) or path.rstrip("/") in taken:
            yield _fault(
                f"claims.{path}",
                value,
                "is no path where a volume can be mounted",
                "an absolute path of its own",
                "/data",
            )
        elif not NAME.fullmatch(claim) or how not in ("", "ro"):
            yield _fault(
                f"claims.{path}",
                value,
                "is no claim",
                "CLAIM, or CLAIM:ro",
                f"'cluster.kubernetes.claims={{{path}: datasets:ro}}'",
            )


def _tolerations(kube: KubernetesSpec) -> Iterator[Fault]:
    for index, one in enumerate(kube.tolerations):
        where = f"tolerations.{index}"
        if one.operator == "Exists" and one.value is not None:
            yield _fault(
                f"{where}.value",
                one.value,
                "goes with operator Equal only",
                "null",
                f"cluster.kubernetes.{where}.operator=Equal",
            )
        elif one.operator == "Equal" and (one.key is None or one.value is None):
            yield _fault(
                where,
                "",
                "operator Equal needs a key and a value",
                "{key: …, operator: Equal, value: …}",
                "operator: Exists",
            )
        elif one.key is not None and not KEY.fullmatch(one.key):
            yield _no_name(f"{where}.key", one.key)


def _no_name(key: str, value: str) -> Fault:
    near = re.sub(r"-{2,}", "-", re.sub(r"[^a-z0-9.-]", "-", value.lower())).strip("-.")
    return _fault(
        key, value or '""', "is no name of Kubernetes'", "small letters, digits and -, a letter or digit at both ends",
        f"cluster.kubernetes.{key}={near or 'default'}", nearest=near,
    )  # fmt: skip


def _fault(key: str, value: str | None, problem: str, allowed: str, fix: str, nearest: str = "") -> Fault:
    shown = "null" if value is None else value
    return Fault(
        key=f"cluster.kubernetes.{key}",
        value=shown,
        problem=problem,
        allowed=allowed,
        fix=fix,
        nearest=nearest,
    )
