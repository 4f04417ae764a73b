"""The Kubernetes backend's parts.

    launcher     manifest.py   a run as objects: ConfigMap, headless Service, Job or JobSet or TrainJob
                 pods.py       the pod of one node: command, environment, mounts
                 sending.py    creates them, each once, whatever answers are lost
    in a pod     pod.py        `python -m hpcdl.launch.kube.pod`: the agent of each try, and what the pod ends with
                 home.py       the run's directory on the volume, made from the ConfigMap where it isn't there
                 meeting.py    which try is next, and whether the other pods are there

Why one failed pod neither ends the others nor is replaced behind their backs. Training is all or nothing: a rank
that is gone stops all. A Job's controller knows nothing of that: it makes a pod that has failed anew, alone, with
the same index and host name. So the pods that are left stay where they are, with their GPUs and images, end the
try, and wait for the new one; then a new try begins in all of them from the newest checkpoint. Nothing is scheduled
again that need not be. A restart of all pods (a JobSet's failure policy) would give GPUs away that another job
takes, and `restartPolicy: OnFailure` knows no podFailurePolicy.

What a pod ends with, and what the Job's podFailurePolicy makes of it:

    DisruptionTarget          preempted, drained, evicted          Ignore: made anew, not counted
    75  (TOLD_TO_END)         SIGTERM; saved where it could        Ignore: the same, of a plain delete
    1, 2, 78, 126, 127, 130   the run has failed for good, its config or image is wrong, or it was cancelled: FailJob
    69  (NO_GOOD), signals    this pod, its node, its agent        counted: backoffLimitPerIndex

Counted an index and not all together, since a fault that takes all pods down is one try, not a try a pod. How often
a run may fail is hpcdl's own count (hpcdl.launch.progress: tries without progress in a row, cluster.max_requeues); it
ends with FailJob. The Job's limit is further out: it counts all failures, progress or not, and is for pods that die
before an agent can count.
"""

TOLD_TO_END = 75
"""EX_TEMPFAIL: this pod was told to end, and the run goes on in another one."""
NO_GOOD = 69
"""EX_UNAVAILABLE: this pod is no good, or has waited too long; another one may do better."""
FINAL = (1, 2, 78, 126, 127, 130)
"""Exit codes after which the Job makes no pod anew: the agent's own words, `not executable` and `not found`."""
GROUP = "HPCDL_POD_GROUP"
SERVICE = "HPCDL_POD_SERVICE"
COUNT = "HPCDL_POD_COUNT"
PORT = "HPCDL_PORT"
JOB = "HPCDL_JOB"
UID = "HPCDL_POD_UID"
NODE = "HPCDL_NODE"
WAIT = "HPCDL_POD_WAIT_S"
INDEX = "JOB_COMPLETION_INDEX"
"""Set by the Job's controller."""
RUNS = "HPCDL_RUNS"
SPEC_DIR = "/etc/hpcdl"
"""Where the ConfigMap lies in a pod."""
SPEC_FILE = "spec.yaml"
RUN_FILE = "run.json"
