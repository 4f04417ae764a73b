"""What only a Kubernetes cluster is told: `cluster.kubernetes`, in Kubernetes' own words where it has any."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le


@dataclass(frozen=True, slots=True, kw_only=True)
class Toleration:
    """One toleration of the pods: lets them on nodes that keep others off."""

    key: str | None = None
    """The taint's key; null with `operator: Exists`: every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """`Exists`: whatever the taint's value; `Equal`: this value."""
    value: str | None = None
    """The taint's value, with `operator: Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Which effect is tolerated; null: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSpec:
    """The cluster's objects, and what their pods get. Null leaves a setting to the cluster's own default."""

    resource: Literal["job", "jobset", "trainjob"] = "job"
    """What a run becomes: an indexed Job with a headless service, a JobSet, or a TrainJob of Kubeflow Trainer v2."""
    image: str | None = None
    """The container image, with hpcdl and torch in it; needed."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When nodes pull it."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of secrets that a private registry asks for."""
    namespace: str | None = None
    """The namespace; null: that of the kubeconfig's context."""
    context: str | None = None
    """The kubeconfig's context; null: its current one."""
    runs_claim: str | None = None
    """The PersistentVolumeClaim that holds runs, which all pods mount (ReadWriteMany); needed."""
    runs_mount: str = "/runs"
    """Where pods mount it: a run is `<runs_mount>/<name>/<run id>` there."""
    runs_sub_path: str | None = None
    """The folder of the volume that holds the runs; null: its root."""
    claims: dict[str, str] = field(default_factory=dict)
    """More claims by the path where pods mount them: `{/data: datasets:ro}`; `:ro` mounts one read-only."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Environment variables from the cluster's secrets: `{HF_TOKEN: SECRET/KEY}`. Only the reference is ever sent."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a pod's node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that the pods tolerate."""
    gpu_resource: str = "nvidia.com/gpu"
    """What a GPU is called; `cluster.gpus_per_node` of them go to each pod."""
    resources: dict[str, str] = field(default_factory=dict)
    """More of a pod's resources, as limits: `{rdma/hca: '1'}`."""
    shm_gb: Annotated[float, Gt(0)] | None = None
    """Size of /dev/shm in GiB, in the pod's memory; null: as much of it as is asked for."""
    labels: dict[str, str] = field(default_factory=dict)
    """More labels of every object and pod."""
    annotations: dict[str, str] = field(default_factory=dict)
    """More annotations of the pods: networks, say."""
    service_account: str | None = None
    """Service account of the pods, which are given no token of it."""
    priority_class: str | None = None
    """Priority class of the pods."""
    scheduler: str | None = None
    """Name of the scheduler."""
    run_as_user: Annotated[int, Ge(0)] | None = None
    """User id of the processes: whose the runs on the volume are; null: the image's."""
    fs_group: Annotated[int, Ge(0)] | None = None
    """Group id that the volumes belong to."""
    queue: str | None = None
    """Kueue's local queue (label kueue.x-k8s.io/queue-name); the object is made suspended then, for Kueue to start."""
    suspend: bool = False
    """Make it suspended: it starts once somebody resumes it."""
    runtime: str = "torch-distributed"
    """With `resource: trainjob`: the ClusterTrainingRuntime."""
    ttl_s: Annotated[int, Ge(0)] | None = 604800
    """Seconds after its end that the object is kept for; null: for ever."""
    grace_s: Annotated[int, Ge(10)] = 120
    """Seconds from SIGTERM to SIGKILL when a pod is told to end: what a checkpoint may take."""
    wait_for_pods_min: Annotated[float, Gt(0)] = 60.0
    """How long pods that have started wait for the others, in minutes."""
    port: Annotated[int, Ge(1024), Le(65534)] = 29500
    """Port of the rendezvous on the first pod; the next one is the agents' own."""
