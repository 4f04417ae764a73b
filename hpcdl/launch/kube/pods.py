"""The pod of one node of a run, as a Job's, a JobSet's or a TrainJob's template has it."""

from __future__ import annotations

from typing import Any

from hpcdl.launch import kube
from hpcdl.runs.kube import names
from hpcdl.spec import ClusterSpec
from hpcdl.spec.kubernetes import KubernetesSpec

Plain = dict[str, Any]
AGENT = ("-m", "hpcdl.launch.kube.pod")
_SETUP = 'exec "$0" "$@"'
"""The last line of a shell that has done cluster.setup: the agent takes its place, and gets the kubelet's signals."""


def template(cluster: ClusterSpec, job: str, labels: Plain) -> Plain:
    """The pod's template; for a Job and a JobSet."""
    kube_spec = _of(cluster)
    spec: Plain = {
        **({"subdomain": job} if kube_spec.resource == "job" else {}),
        "restartPolicy": "Never",
        **placing(kube_spec),
        **_only(priorityClassName=kube_spec.priority_class, schedulerName=kube_spec.scheduler),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container(cluster, job)],
        "volumes": volumes(cluster, job),
    }
    return {"metadata": metadata(kube_spec, labels), "spec": spec}


def metadata(kube_spec: KubernetesSpec, labels: Plain) -> Plain:
    """A pod's labels and annotations."""
    return {"labels": labels, **_only(annotations=dict(kube_spec.annotations) or None)}


def placing(kube_spec: KubernetesSpec) -> Plain:
    """Where a pod may run, as whom, and how long it may take to end: what a TrainJob can say as well."""
    security = _only(runAsUser=kube_spec.run_as_user, fsGroup=kube_spec.fs_group)
    return {
        "terminationGracePeriodSeconds": kube_spec.grace_s,
        **_only(
            serviceAccountName=kube_spec.service_account,
            imagePullSecrets=[{"name": name} for name in kube_spec.image_pull_secrets] or None,
            nodeSelector=dict(kube_spec.node_selector) or None,
            tolerations=[
                _only(key=one.key, operator=one.operator, value=one.value, effect=one.effect)
                for one in kube_spec.tolerations
            ]
            or None,
            securityContext=security or None,
        ),
    }


def container(cluster: ClusterSpec, job: str) -> Plain:
    """The one container."""
    kube_spec = _of(cluster)
    return {
        "name": names.CONTAINER,
        "image": kube_spec.image,
        **_only(imagePullPolicy=kube_spec.image_pull_policy),
        "command": command(cluster),
        "env": environment(cluster, job),
        **_only(resources=resources(cluster) or None),
        "volumeMounts": mounts(kube_spec),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {"allowPrivilegeEscalation": False},
    }


def command(cluster: ClusterSpec) -> list[str]:
    """The agent, which is the container's first process: the kubelet's SIGTERM is for it."""
    agent = [cluster.python or "python", *AGENT]
    return ["bash", "-euc", "\n".join((*cluster.setup, _SETUP)), *agent] if cluster.setup else agent


def environment(cluster: ClusterSpec, job: str) -> list[Plain]:
    """What the agent is told; the workers' own variables stand in the spec."""
    kube_spec = _of(cluster)
    told = {
        kube.JOB: job,
        kube.GROUP: names.group(job, kube_spec.resource),
        kube.SERVICE: job,
        kube.COUNT: str(cluster.nodes),
        kube.PORT: str(kube_spec.port),
        kube.WAIT: f"{kube_spec.wait_for_pods_min * 60:g}",
        kube.RUNS: kube_spec.runs_mount,
    }
    seen = {kube.UID: "metadata.uid", kube.NODE: "spec.nodeName"}
    return [
        *({"name": name, "value": value} for name, value in told.items()),
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in seen.items()),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": _secret(ref)}}
            for name, ref in kube_spec.secrets.items()
        ),
    ]


def _secret(reference: str) -> Plain:
    name, _, key = reference.partition("/")
    return {"name": name, "key": key}


def resources(cluster: ClusterSpec) -> Plain:
    """Requests and limits, the same: nobody else has what a rank counts on."""
    kube_spec = _of(cluster)
    wanted = {
        "cpu": str(cluster.cpus_per_node),
        **({} if cluster.mem_gb is None else {"memory": f"{round(cluster.mem_gb * 1024)}Mi"}),
        **({kube_spec.gpu_resource: str(cluster.gpus_per_node)} if cluster.gpus_per_node else {}),
        **kube_spec.resources,
    }
    return {"requests": dict(wanted), "limits": dict(wanted)}


def mounts(kube_spec: KubernetesSpec) -> list[Plain]:
    """Where the volumes lie in the container."""
    return [
        {"name": "spec", "mountPath": kube.SPEC_DIR, "readOnly": True},
        {"name": "runs", "mountPath": kube_spec.runs_mount, **_only(subPath=kube_spec.runs_sub_path)},
        {"name": "shm", "mountPath": "/dev/shm"},
        *(
            {
                "name": f"claim-{number}",
                "mountPath": path,
                **({"readOnly": True} if _read_only(claim) else {}),
            }
            for number, (path, claim) in enumerate(kube_spec.claims.items())
        ),
    ]


def volumes(cluster: ClusterSpec, job: str) -> list[Plain]:
    """The spec, the runs, shared memory for data loaders and NCCL (64 MiB without it), and the user's own claims."""
    kube_spec = _of(cluster)
    shm = {"medium": "Memory"}
    if kube_spec.shm_gb is not None:
        shm["sizeLimit"] = f"{round(kube_spec.shm_gb * 1024)}Mi"
    return [
        {"name": "spec", "configMap": {"name": job}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": kube_spec.runs_claim}},
        {"name": "shm", "emptyDir": shm},
        *(
            {
                "name": f"claim-{number}",
                "persistentVolumeClaim": {
                    "claimName": claim.partition(":")[0],
                    **({"readOnly": True} if _read_only(claim) else {}),
                },
            }
            for number, claim in enumerate(kube_spec.claims.values())
        ),
    ]


def _read_only(claim: str) -> bool:
    return claim.endswith(":ro")


def _of(cluster: ClusterSpec) -> KubernetesSpec:
    assert cluster.kubernetes is not None
    return cluster.kubernetes


def _only(**values: Any) -> Plain:
    """Those that are there."""
    return {name: value for name, value in values.items() if value is not None}
