"""Kubernetes: each run an indexed Job (a JobSet, a TrainJob) of one pod a node, rendered here as YAML.

The text that a dry run prints is what is sent, object by object: a ConfigMap with the spec, a headless Service, the
Job. A sweep is a Job a point; a queue (`cluster.kubernetes.queue`: Kueue) says how many run at a time.

A pod, of `cluster.nodes` alike (hpcdl.launch.kube says why, and what follows a pod's failure):

    container    `node`, image `cluster.kubernetes.image`: hpcdl and torch, `python` on its PATH
    command      python -m hpcdl.launch.kube.pod      (with cluster.setup: bash -euc '<lines>; exec "$0" "$@"' python …)
    environment  HPCDL_JOB=<job>  HPCDL_POD_GROUP=<group>  HPCDL_POD_SERVICE=<job>  HPCDL_POD_COUNT=<nodes>
                 HPCDL_PORT=29500  HPCDL_POD_WAIT_S=3600  HPCDL_RUNS=/runs
                 HPCDL_POD_UID (the pod's own), HPCDL_NODE (the machine's name), the secrets
                 JOB_COMPLETION_INDEX=0…n-1, from the Job's controller
    mounts       /etc/hpcdl: spec.yaml and run.json (`{"run": "<name>/<run id>", "token", "index", "attempt"}`)
                 /runs: the runs, the same volume in all pods (read and written by all); /dev/shm: memory
    names        the pod's host name is `<group>-<index>`, and `<group>-<index>.<job>` leads to it from the others;
                 <job> is `<experiment>-<token>-<run's index>`, <group> the same (a JobSet's: `<job>-node-0`)
    ports        the rendezvous on pod 0 (29500) and the agents' pulse (29501)
    signals      SIGTERM: save and stop, within `cluster.kubernetes.grace_s`
"""

from __future__ import annotations

from hpcdl.launch.base import JobRequest
from hpcdl.launch.kube import manifest


class KubernetesBackend:
    """The API server."""

    def render(self, request: JobRequest) -> str:
        """The objects of all runs, as YAML."""
        return manifest.text(request)

    def submit(self, request: JobRequest, text: str) -> str | None:
        """Creates the objects; returns what the names of the Jobs begin with.

        Raises:
            Unanswered: the API server has not answered for as long as we wait; a Job may have been made.
            SchedulerError: no client or kubeconfig here, or it refused; with its own words and what to do.
        """
        from hpcdl.launch.kube import sending  # the client takes long to import

        return sending.send(request, text)


BACKEND = KubernetesBackend()
