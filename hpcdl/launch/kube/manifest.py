"""A submission as Kubernetes' objects, and these as text: pure functions of the request."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from hpcdl.launch import kube
from hpcdl.launch.base import JobRequest
from hpcdl.launch.kube import pods
from hpcdl.runs.kinds import NEVER_RESTART
from hpcdl.runs.kube import names
from hpcdl.spec.kubernetes import KubernetesSpec

Plain = dict[str, Any]


def text(request: JobRequest) -> str:
    """The objects of all runs as one stream of YAML documents."""
    count = len(request.run_dirs)
    runs, each = (
        f"{count} run{'s' if count > 1 else ''}",
        f"{_kind(request)} of {request.cluster.nodes} pod(s)",
    )
    head = f"# {request.name}: {runs}, each a {each}\n"
    documents = [
        yaml.dump(one, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)
        for index in range(count)
        for one in objects(request, index)
    ]
    return head + "".join(f"---\n{document}" for document in documents)


def read(text_: str) -> list[Plain]:
    """The objects of such a text."""
    return [one for one in yaml.load_all(text_, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if one]


def objects(request: JobRequest, index: int) -> list[Plain]:
    """The objects of one run, in the order in which they are created: what a pod needs comes before it."""
    kube_spec = _of(request)
    job = names.job(request.name, request.token, index)
    labels = {
        **names.MANAGED,
        names.SUBMISSION: request.token,
        names.JOB: job,
        names.RUN: request.run_dirs[index].name,
        **kube_spec.labels,
    }
    data = _data(request, index)
    annotations = {names.SPEC: digest(data)}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(kube_spec, job, labels, annotations),
        "immutable": True,
        "data": data,
    }
    made = [config]
    if kube_spec.resource == "job":
        made.append(_service(kube_spec, job, labels))
    resource = {"job": _job, "jobset": _jobset, "trainjob": _trainjob}[kube_spec.resource]
    queue = {names.QUEUE: kube_spec.queue} if kube_spec.queue else {}
    group, version, _, kind = names.KINDS[kube_spec.resource]
    made.append(
        {
            "apiVersion": f"{group}/{version}",
            "kind": kind,
            "metadata": _metadata(kube_spec, job, {**labels, **queue}, annotations),
            "spec": resource(request, job, labels),
        }
    )
    return made


def digest(data: Plain) -> str:
    """Of what a run's pods are given: tells two submissions that bear one name apart."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]


def _data(request: JobRequest, index: int) -> Plain:
    run: Path = request.run_dirs[index]
    given = request.specs[run]
    facts = {
        "run": f"{run.parent.name}/{run.name}",
        "token": request.token,
        "index": index,
        "attempt": given.attempt,
    }
    return {kube.RUN_FILE: json.dumps(facts) + "\n", kube.SPEC_FILE: given.text}


def _metadata(kube_spec: KubernetesSpec, name: str, labels: Plain, annotations: Plain) -> Plain:
    namespace = {"namespace": kube_spec.namespace} if kube_spec.namespace else {}
    return {"name": name, **namespace, "labels": labels, "annotations": annotations}


def _service(kube_spec: KubernetesSpec, job: str, labels: Plain) -> Plain:
    """Headless: gives each pod the name `<job>-<index>.<job>`, also before it is ready."""
    ports = {"rendezvous": kube_spec.port, "agents": kube_spec.port + 1}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": job,
            **({"namespace": kube_spec.namespace} if kube_spec.namespace else {}),
            "labels": labels,
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {names.JOB: job},
            "ports": [{"name": name, "port": port} for name, port in ports.items()],
        },
    }


def _job(request: JobRequest, job: str, labels: Plain) -> Plain:
    kube_spec = _of(request)
    return {
        **_suspended(kube_spec),
        **({} if kube_spec.ttl_s is None else {"ttlSecondsAfterFinished": kube_spec.ttl_s}),
        **_job_spec(request, job, labels),
    }


def _job_spec(request: JobRequest, job: str, labels: Plain) -> Plain:
    """An indexed Job: a pod a node, all at once, each made anew by the rules of hpcdl.launch.kube."""
    cluster = request.cluster
    # An outer guard, for what ends before the agent can count: it counts tries without progress, the Job counts all.
    limit = 3 * cluster.max_requeues + 3
    return {
        "completionMode": "Indexed",
        "completions": cluster.nodes,
        "parallelism": cluster.nodes,
        "backoffLimitPerIndex": limit,
        "maxFailedIndexes": 0,
        # For clusters that don't know the limit per index (before 1.29).
        "backoffLimit": limit * cluster.nodes,
        "podReplacementPolicy": "Failed",
        **_deadline(request),
        "podFailurePolicy": {"rules": _rules()},
        "template": pods.template(cluster, job, labels),
    }


def _rules() -> list[Plain]:
    assert NEVER_RESTART in kube.FINAL
    codes = {"containerName": names.CONTAINER, "operator": "In"}
    none: list[Plain] = []  # 1.28's schema wants it to be there; empty, no version minds it
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {**codes, "values": list(kube.FINAL)},
            "onPodConditions": none,
        },
        {
            "action": "Ignore",
            "onExitCodes": {**codes, "values": [kube.TOLD_TO_END]},
            "onPodConditions": none,
        },
    ]


def _jobset(request: JobRequest, job: str, labels: Plain) -> Plain:
    """One replicated Job. Its own rules decide on its pods; where it fails, the JobSet has failed."""
    kube_spec = _of(request)
    return {
        **_suspended(kube_spec),
        **({} if kube_spec.ttl_s is None else {"ttlSecondsAfterFinished": kube_spec.ttl_s}),
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": job},
        "replicatedJobs": [
            {
                "name": names.REPLICATED,
                "replicas": 1,
                "template": {"metadata": {"labels": labels}, "spec": _job_spec(request, job, labels)},
            }
        ],
    }


def _trainjob(request: JobRequest, job: str, labels: Plain) -> Plain:
    """What a TrainJob can say; retries, its pods' restarts and its end are its runtime's."""
    cluster, kube_spec = request.cluster, _of(request)
    node = pods.container(cluster, job)
    patch = {
        "metadata": pods.metadata(kube_spec, labels),
        "spec": {
            **pods.placing(kube_spec),
            "containers": [{"name": names.CONTAINER, "volumeMounts": node["volumeMounts"]}],
            "volumes": pods.volumes(cluster, job),
        },
    }
    replicated = {"name": names.REPLICATED, "template": {"spec": {"template": patch}}}
    return {
        **_suspended(kube_spec),
        **_deadline(request),
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "ClusterTrainingRuntime",
            "name": kube_spec.runtime,
        },
        "trainer": {
            "image": node["image"],
            "command": node["command"],
            "env": node["env"],
            "numNodes": cluster.nodes,
            "numProcPerNode": cluster.processes_per_node,
            "resourcesPerNode": pods.resources(cluster),
        },
        "runtimePatches": [
            {
                "manager": "hpcdl.launch/submit",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
            }
        ],
    }


def _suspended(kube_spec: KubernetesSpec) -> Plain:
    return {"suspend": True} if kube_spec.suspend or kube_spec.queue else {}


def _deadline(request: JobRequest) -> Plain:
    limit = request.cluster.time_min
    return {} if limit is None else {"activeDeadlineSeconds": limit * 60}


def _kind(request: JobRequest) -> str:
    return names.KINDS[_of(request).resource][3]


def _of(request: JobRequest) -> KubernetesSpec:
    assert request.cluster.kubernetes is not None
    return request.cluster.kubernetes


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they stand; nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _represent_text)
