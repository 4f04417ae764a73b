"""What a run's objects are called, from what a submission carries: whoever has lost an answer finds them by name."""

from __future__ import annotations

import re

PREFIX = "hpcdl/"
SUBMISSION = PREFIX + "submission"
"""Label: the submission's token."""
JOB = PREFIX + "job"
"""Label of every object and pod of a run: the name of its Job, JobSet or TrainJob."""
RUN = PREFIX + "run"
"""Label: the run's id."""
SPEC = PREFIX + "spec"
"""Annotation: digest of what was sent."""
MANAGED = {"app.kubernetes.io/name": "hpcdl", "app.kubernetes.io/managed-by": "hpcdl"}
QUEUE = "kueue.x-k8s.io/queue-name"
CONTAINER = "node"
"""The container that runs the agent: what Kubeflow's runtimes call it, too."""
REPLICATED = "node"
"""A JobSet's one replicated Job: what Kubeflow's runtimes call it, too."""
_SLUG = 24
"""Letters of the experiment's name: with a token, an index, `-node-0` and a pod's number no name is over 63."""

KINDS = {
    "job": ("batch", "v1", "jobs", "Job"),
    "jobset": ("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet"),
    "trainjob": ("trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob"),
}
"""Group, version, plural and kind of each `cluster.kubernetes.resource`."""


def base(name: str, token: str) -> str:
    """What the names of a submission's Jobs begin with: a DNS label that begins with a letter, as a Service's must."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug[:1].isalpha():
        slug = f"run-{slug}".rstrip("-")
    return f"{slug[:_SLUG].rstrip('-')}-{token}"


def job(name: str, token: str, index: int) -> str:
    """The Job, JobSet or TrainJob of a submission's run."""
    return f"{base(name, token)}-{index}"


def group(job_name: str, resource: str) -> str:
    """What the host names of a run's pods begin with: `<group>-<completion index>`."""
    return job_name if resource == "job" else f"{job_name}-{REPLICATED}-0"
