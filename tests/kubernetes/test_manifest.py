"""The rendered objects against Kubernetes' published schemas, in which an unknown field is an error, and JobSet's and
Kubeflow Trainer's own models.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import kubernetes_validate
import pydantic
import pytest
from kubeflow_trainer_api import models

from hpcdl import experiment
from hpcdl.launch import kube, kubernetes
from hpcdl.launch.kube import manifest
from hpcdl.runs.kube import names
from hpcdl.spec import ClusterSpec
from tests.factory import tiny_plain
from tests.kubernetes.making import TOKEN, cluster, objects, request

VERSIONS = ("1.28", "1.30", "1.33", "1.37")
EVERYTHING: dict[str, Any] = {
    "image_pull_policy": "IfNotPresent",
    "image_pull_secrets": ("registry",),
    "namespace": "research",
    "runs_sub_path": "me/runs",
    "claims": {"/data": "datasets:ro", "/scratch": "scratch"},
    "secrets": {"HF_TOKEN": "huggingface/token"},
    "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
    "resources": {"rdma/hca": "1"},
    "shm_gb": 8.0,
    "labels": {"team": "vision"},
    "annotations": {"k8s.v1.cni.cncf.io/networks": "ib0"},
    "service_account": "trainer",
    "run_as_user": 1000,
    "fs_group": 1000,
    "queue": "team-vision",
}
PLACED: dict[str, Any] = {"priority_class": "low", "scheduler": "volcano"}


def everything(resource: str) -> ClusterSpec:
    """A cluster section with every key in use."""
    own = {**EVERYTHING, **(PLACED if resource != "trainjob" else {}), "resource": resource}
    if resource == "trainjob":
        own.pop("image_pull_policy")
    tolerations = [
        {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
        {"key": "a", "operator": "Equal", "value": "b"},
    ]
    from hpcdl.spec.kubernetes import Toleration

    own["tolerations"] = tuple(Toleration(**one) for one in tolerations)
    return cluster(
        own, nodes=4, processes_per_node=8, gpus_per_node=8, cpus_per_process=4, mem_gb=200.5, time_min=60,
        setup=("source /opt/env.sh",), env={"NCCL_DEBUG": "INFO"},
    )  # fmt: skip


SECTIONS = {"least": cluster(), "two nodes": cluster(nodes=2), "everything": everything("job")}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_each_object_keeps_the_schema(version: str, section: ClusterSpec) -> None:
    for one in objects(section).values():
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_field_would_be_found(version: str) -> None:
    job = objects()["Job"]
    job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


def strictly(hint: Any, value: Any, path: str = "") -> None:
    """Every key is a field of the model's, and every value of its type: the models themselves leave unknown keys out.

    A quantity's model is an object, though it is a text that goes over the line.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is models.IoK8sApimachineryPkgApiResourceQuantity:
        assert isinstance(value, str), path
    elif isinstance(hint, type) and issubclass(hint, pydantic.BaseModel):
        fields = {field.alias or name: field for name, field in hint.model_fields.items()}
        assert set(value) <= set(fields), f"{path}: {sorted(set(value) - set(fields))}"
        assert all(name in value for name, field in fields.items() if field.is_required()), path
        for name, below in value.items():
            strictly(fields[name].annotation, below, f"{path}.{name}")
    elif origin is list:
        for number, below in enumerate(value):
            strictly(inner[0], below, f"{path}.{number}")
    elif origin is dict:
        for name, below in value.items():
            strictly(inner[1], below, f"{path}.{name}")
    elif origin is typing.Union:
        strictly(next(one for one in inner if one is not type(None)), value, path)
    else:
        pydantic.TypeAdapter(hint).validate_python(value, strict=True)


@pytest.mark.parametrize(
    ("resource", "model"),
    [("jobset", models.JobsetV1alpha2JobSet), ("trainjob", models.TrainerV1alpha1TrainJob)],
)
def test_jobsets_and_trainjobs_keep_their_models(resource: str, model: type[pydantic.BaseModel]) -> None:
    made = objects(everything(resource))
    kind = names.KINDS[resource][3]
    assert set(made) == {"ConfigMap", kind}, "their controllers make the Service"
    strictly(model, made[kind])
    made[kind]["spec"]["sspend"] = True
    with pytest.raises(AssertionError, match="sspend"):
        strictly(model, made[kind])
    if resource == "jobset":
        job = made[kind]["spec"]["replicatedJobs"][0]["template"]
        for version in VERSIONS:
            child = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["spec"]}
            kubernetes_validate.validate(child, version, strict=True)


def test_the_pod_says_what_it_is() -> None:
    job = objects(cluster({"resource": "jobset"}, nodes=3))["JobSet"]["spec"]
    container = job["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    told = {one["name"]: one.get("value") for one in container["env"]}
    base = f"tiny-{TOKEN}-0"
    assert (told[kube.GROUP], told[kube.SERVICE], told[kube.COUNT]) == (f"{base}-node-0", base, "3")
    assert job["network"]["subdomain"] == base


def test_secrets_are_named_and_never_sent() -> None:
    (container,) = objects(everything("job"))["Job"]["spec"]["template"]["spec"]["containers"]
    (secret,) = [one for one in container["env"] if one["name"] == "HF_TOKEN"]
    assert secret == {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "huggingface", "key": "token"}},
    }


def test_codes_are_in_order() -> None:
    """The API server refuses values that aren't, which no schema says."""
    rules = objects()["Job"]["spec"]["podFailurePolicy"]["rules"]
    for rule in rules:
        values = rule.get("onExitCodes", {}).get("values", [])
        assert values == sorted(set(values)) and 0 not in values
    assert [rule["action"] for rule in rules] == ["Ignore", "FailJob", "Ignore"]


@pytest.mark.parametrize("name", ["a", "pretrain_tiny", "3d-unet", "한글", "A" * 99, "x.y_z", "-", "7"])
def test_names_are_dns_labels(name: str) -> None:
    for index in (0, 1000):
        job = names.job(name, f"{TOKEN}-12", index)
        longest = f"{names.group(job, 'trainjob')}-9999"
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job) and len(longest) <= 63


def test_a_sweep_is_one_text() -> None:
    made = manifest.read(kubernetes.BACKEND.render(request(count=3)))
    assert [one["metadata"]["name"] for one in made if one["kind"] == "Job"] == [
        f"tiny-{TOKEN}-{i}" for i in range(3)
    ]


def faults(**changes: Any) -> dict[str, str]:
    own = {"image": "r/i:1", "runs_claim": "runs", **changes.pop("kubernetes", {})}
    plain = tiny_plain(cluster={"kind": "kubernetes", "signal": None, "kubernetes": own, **changes})
    return {fault.key: f"{fault.problem} {fault.fix}" for fault in experiment.check(plain).faults}


def test_right_is_right() -> None:
    assert faults() == {}
    own = dataclasses.asdict(everything("job").kubernetes)  # type: ignore[arg-type]
    assert faults(kubernetes=own) == {}


@pytest.mark.parametrize(
    ("key", "given", "told"),
    [
        ("image", {"image": None}, "pods need a container image"),
        ("runs_claim", {"runs_claim": None}, "a volume that all pods mount"),
        ("namespace", {"namespace": "My_Team"}, "cluster.kubernetes.namespace=my-team"),
        ("secrets.HF_TOKEN", {"secrets": {"HF_TOKEN": "no-reference"}}, "take it out here"),
        ("secrets.1X", {"secrets": {"1X": "a/b"}}, "no name of an environment variable"),
        ("labels.hpcdl/run", {"labels": {"hpcdl/run": "x"}}, "set by hpcdl itself"),
        ("labels.a", {"labels": {"a": "b c"}}, "no value of a label"),
        ("resources.cpu", {"resources": {"cpu": "1"}}, "cluster.cpus_per_process"),
        ("resources.rdma/hca", {"resources": {"rdma/hca": "one"}}, "no quantity"),
        ("claims.data", {"claims": {"data": "x"}}, "no path"),
        ("claims./data", {"claims": {"/data": "x:rw"}}, "no claim"),
        ("runs_mount", {"runs_mount": "/etc/hpcdl"}, "no path"),
        ("runs_sub_path", {"runs_sub_path": "../x"}, "no path within"),
        ("tolerations.0", {"tolerations": [{"operator": "Equal", "key": "a"}]}, "needs a key and a value"),
        ("priority_class", {"resource": "trainjob", "priority_class": "low"}, "its runtime says it"),
    ],
)
def test_what_is_wrong_is_told(key: str, given: dict[str, Any], told: str) -> None:
    found = faults(kubernetes=given)
    assert told in found[f"cluster.kubernetes.{key}"], found


def test_slurms_keys_are_refused() -> None:
    found = faults(
        partition="gpu", signal="USR2@120", extra=["--mail-type=END"], min_nodes=1, requeue="successor"
    )
    keys = {f"cluster.{key}" for key in ("partition", "signal", "extra", "min_nodes", "requeue")}
    assert set(found) == keys
    assert "cluster.kubernetes.queue" in found["cluster.partition"]


def test_a_secret_in_its_place_is_refused_and_not_shown() -> None:
    plain = tiny_plain(
        cluster={
            "kind": "kubernetes", "signal": None,
            "kubernetes": {"image": "i", "runs_claim": "r", "secrets": {"HF_TOKEN": "hf_abcdefghijklmnopqrst"}},
        }
    )  # fmt: skip
    for fault in experiment.check(plain).faults:
        assert "hf_abc" not in str(fault)
