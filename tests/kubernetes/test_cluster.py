"""The client against a mock API server: submitted once whatever answers are lost, looked at, preempted, cancelled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import SchedulerError
from hpcdl.launch import kubernetes, lost
from hpcdl.launch.__main__ import main
from hpcdl.launch.base import JobRequest
from hpcdl.launch.kube import sending
from hpcdl.runs import logs, wish
from hpcdl.runs.cancel import How, cancel
from hpcdl.runs.files import write_json
from hpcdl.runs.kube import look
from hpcdl.runs.reconcile import View
from hpcdl.runs.reconcile import look as looked
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir, decide_job, now, read_submission
from tests.kubernetes.making import TOKEN, cluster, request
from tests.kubernetes.server import NAMESPACE, Server

JOB = f"tiny-{TOKEN}-0"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("kubernetes")) as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig))
        monkeypatch.setenv("HPCDL_SLURM_PATIENCE_S", "5")
        look.connect.cache_clear()
        yield running


def submitted(server: Server, runs_dir: Path, **more: Any) -> tuple[JobRequest, RunDir]:
    """A run that was sent to the cluster, as the launcher leaves it."""
    made = claimed(runs_dir, **more)
    base = sending.send(made, kubernetes.BACKEND.render(made))
    decide_job(runs_dir, made.token, base)
    return made, RunDir(made.run_dirs[0])


def claimed(runs_dir: Path, count: int = 1, nodes: int = 2, **kube: Any) -> JobRequest:
    """A submission whose runs the launcher has claimed, and no more."""
    made = request(cluster(kube, nodes=nodes), count=count, runs_dir=runs_dir)
    made.folder.mkdir(parents=True)
    record = {
        "token": made.token,
        "job_id": None,
        "kind": "kubernetes",
        "created": now(),
        "host": "x",
        "pid": 1,
    }
    write_json(made.folder / "submission.json", record)
    for index, path in enumerate(made.run_dirs):
        path.mkdir(parents=True)
        RunDir(path).write_state(
            RunState(
                run_id=path.name, name="tiny", state="PENDING", kind="kubernetes", submission=made.token,
                array_index=index, nodes=nodes, world_size=nodes, max_steps=6, created=now(),
            )
        )  # fmt: skip
    return made


def pod(index: int, phase: str = "Running", **status: Any) -> dict[str, Any]:
    """A pod of the Job, as the API server shows it."""
    labels = {"app.kubernetes.io/name": "hpcdl", "app.kubernetes.io/managed-by": "hpcdl", "hpcdl/job": JOB}
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": f"{JOB}-{index}-abcde", "namespace": NAMESPACE, "labels": labels,
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        },
        "status": {"phase": phase, **status},
    }  # fmt: skip


def ended(index: int, code: int, message: str = "", reason: str = "Error", **status: Any) -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "reason": reason, "message": message}}
    return pod(index, "Failed", containerStatuses=[{"name": "node", "state": state}], **status)


def last_words(state: str, reason: str) -> str:
    return json.dumps({"submission": TOKEN, "state": state, "reason": reason, "exit_code": 78})


def waiting(index: int, reason: str, message: str) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return pod(index, "Pending", containerStatuses=[{"name": "node", "state": state}])


def condition(server: Server, kind: str, reason: str = "", message: str = "") -> None:
    job = server.get("Job", JOB)
    assert job is not None
    entry = {"type": kind, "status": "True", "reason": reason, "message": message}
    entry["lastTransitionTime"] = "2026-01-31T12:00:00Z"
    server.put("Job", {**job, "status": {"conditions": [entry]}})


def as_it_is(run: RunDir) -> View:
    return looked(run)


# --- submit ---------------------------------------------------------------------------------------------------


WORDS = (
    "+experiment=pretrain_tiny", "cluster=kubernetes", "cluster.nodes=2", "cluster.kubernetes.image=r/i:1",
    "cluster.kubernetes.runs_claim=runs", "cluster.kubernetes.queue=team",
)  # fmt: skip


def test_a_run_cannot_wait_for_one_that_is_not_over(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, f"runs_dir={tmp_path}", "parsable=true"]
    assert main(words) == 0
    run_id, job, _ = capsys.readouterr().out.strip().split("\t")
    assert main([*words, "name=later", f"after={run_id}"]) == 2
    said = capsys.readouterr().err
    assert "after = " in said and "Kubernetes' Jobs can't wait for one another" in said
    assert server.names("Job") == [job]


def test_a_launch_from_the_command_line(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, f"runs_dir={tmp_path}"]
    assert main([*words, "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert main([*words, "parsable=true"]) == 0
    _, job, run_dir = capsys.readouterr().out.strip().split("\t")
    assert (Path(run_dir) / "job.sh").read_text() in printed, "what is printed is what is sent"
    assert server.names("Job") == server.names("ConfigMap") == server.names("Service") == [job]
    made = server.get("Job", job)
    assert made is not None and made["spec"]["suspend"] is True
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert server.get("ConfigMap", job)["data"]["spec.yaml"] == (Path(run_dir) / "spec.yaml").read_text()  # type: ignore[index]
    run = RunDir(Path(run_dir))
    view = as_it_is(run)
    assert (view.state.state, view.state.job_id) == ("PENDING", job)
    assert view.state.reason == "waits in Kueue's queue team"
    assert main(words) == 0, "launched again, it is found"
    assert "already PENDING: nothing was submitted" in capsys.readouterr().out


def test_a_lost_answer_makes_no_second_job(server: Server, tmp_path: Path) -> None:
    """The API server has made the Job, and its answer didn't come."""
    server.fails(f"post {JOBS}", 504, times=1)
    submitted(server, tmp_path)
    assert server.names("Job") == [JOB]
    assert [one for one in server.asked() if one.startswith("POST") and one.endswith("jobs")] == [
        f"POST {JOBS}"
    ] * 2


def test_an_api_that_stays_away_leaves_the_run_to_be_found(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCDL_SLURM_PATIENCE_S", "0")
    made = claimed(tmp_path)
    server.fails(f"post {JOBS}", 503, times=1)
    with pytest.raises(lost.Unanswered, match=r"Kubernetes does not answer: 503"):
        sending.send(made, kubernetes.BACKEND.render(made))
    run = RunDir(made.run_dirs[0])
    view = as_it_is(run)
    assert (view.state.job_id, view.state.state) == (JOB, "PENDING"), (
        "the Job was made, and is found by its name"
    )


def test_a_name_that_is_taken_by_another_launch(server: Server, tmp_path: Path) -> None:
    submitted(server, tmp_path / "a")
    job = server.get("Job", JOB)
    assert job is not None
    job["metadata"]["creationTimestamp"] = "2020-01-31T12:00:00Z"
    server.put("Job", job)
    server.remove("ConfigMap", JOB)
    server.remove("Service", JOB)
    with pytest.raises(
        SchedulerError, match=rf"Job {JOB} is in namespace {NAMESPACE} already, since 2020.*\nfix: kube"
    ):
        submitted(server, tmp_path / "b")
    assert server.names("ConfigMap") == server.names("Service") == [], "what had been made is taken away"
    assert server.names("Job") == [JOB]


def test_what_is_refused_is_told_with_what_is_missing(server: Server, tmp_path: Path) -> None:
    forbidden = (
        'jobs.batch is forbidden: User "me" cannot create resource "jobs" in API group "batch" '
        f'in the namespace "{NAMESPACE}"'
    )
    server.fails(f"post {JOBS}", 403, {"message": forbidden}, times=1)
    with pytest.raises(SchedulerError) as caught:
        submitted(server, tmp_path)
    assert 'verbs: [create], resources: [jobs], apiGroups: ["batch"]' in str(caught.value)
    assert "kubectl auth can-i create jobs.batch -n research" in str(caught.value)
    assert server.names("ConfigMap") == server.names("Service") == []


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (404, 'namespaces "research" not found', "cluster.kubernetes.namespace=…"),
        (404, "the server could not find the requested resource", "its controller isn't installed"),
        (401, "Unauthorized", "log in to the cluster again"),
        (422, 'Job.batch "x" is invalid: spec.template: Invalid value', "Invalid value"),
        (403, "exceeded quota: gpus, requested: 8, used: 8, limited: 8", "ask for less"),
    ],
)
def test_each_refusal_has_its_fix(
    server: Server, tmp_path: Path, status: int, message: str, told: str
) -> None:
    path = f"post /api/v1/namespaces/{NAMESPACE}/configmaps"
    server.fails(path, status, {"message": message}, times=1)
    with pytest.raises(SchedulerError) as caught:
        submitted(server, tmp_path)
    assert message in str(caught.value) and told in str(caught.value)


def test_no_cluster_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    with pytest.raises(SchedulerError, match=r"no cluster to ask: .*\nfix: kubectl config get-contexts"):
        submitted(Server(tmp_path), tmp_path)


# --- look -----------------------------------------------------------------------------------------------------


def test_why_it_waits_is_told(server: Server, tmp_path: Path) -> None:
    _, run = submitted(server, tmp_path)
    assert as_it_is(run).state.reason == "2 of 2 pods are being made"
    server.put("Pod", pod(0))
    server.put("Pod", waiting(1, "ImagePullBackOff", 'Back-off pulling image "r/i:2"'))
    view = as_it_is(run)
    assert (view.state.state, view.state.reason) == (
        "PENDING", '1 of 2 pods: ImagePullBackOff: Back-off pulling image "r/i:2"',
    )  # fmt: skip
    refused = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes: no gpu",
    }
    server.put("Pod", pod(1, "Pending", conditions=[refused]))
    assert as_it_is(run).state.reason == "1 of 2 pods: Unschedulable: 0/3 nodes: no gpu"


def test_it_runs_is_preempted_runs_again_and_ends(server: Server, tmp_path: Path) -> None:
    _, run = submitted(server, tmp_path)
    running = {
        "containerStatuses": [{"name": "node", "state": {"running": {"startedAt": "2026-01-31T11:00:00Z"}}}]
    }
    server.put("Pod", pod(0, **running))
    server.put("Pod", pod(1, **running))
    assert as_it_is(run).state.state == "RUNNING"
    assert run.read_state().started == "2026-01-31T11:00:00.000+00:00"
    disruption = {"type": "DisruptionTarget", "status": "True", "message": "preempted by pod other"}
    server.put("Pod", ended(1, 75, conditions=[disruption]))
    view = as_it_is(run)
    assert view.state.state == "PENDING"
    assert view.state.reason.startswith("a pod is gone (preempted by pod other); the Job makes it anew")
    assert run.events()[-1]["event"] == "requeued"
    server.put("Pod", pod(1, **running))
    assert as_it_is(run).state.state == "RUNNING"
    words = json.dumps({"code": 0, "submission": TOKEN, "state": "COMPLETED", "step": 6})
    server.put(
        "Pod",
        {**ended(0, 0, words, "Completed"), "status": {**ended(0, 0, words)["status"], "phase": "Succeeded"}},
    )
    condition(server, "Complete")
    view = as_it_is(run)
    assert (view.state.state, view.state.exit_code, view.state.ended) == (
        "COMPLETED",
        0,
        "2026-01-31T12:00:00.000+00:00",
    )
    assert run.events()[-1]["step"] == 6


def test_where_the_agent_has_spoken_its_word_stands(server: Server, tmp_path: Path) -> None:
    """The launcher sees the volume: state.json is the agents' own, and what only the cluster knows is added."""
    _, run = submitted(server, tmp_path)
    (run.path / ".pods").mkdir()
    server.put("Pod", pod(0))
    server.put("Pod", pod(1))
    run.update(reason="waits for pod 1 of 2")
    assert as_it_is(run).state.reason == "waits for pod 1 of 2"
    run.update(state="RUNNING", reason="")
    server.put("Pod", ended(1, 137))
    assert as_it_is(run).state.state == "RUNNING", "the first pod goes on, and says what follows"
    server.put("Pod", ended(0, 137))
    assert as_it_is(run).state.state == "PENDING", "nobody is left to say so"


@pytest.mark.parametrize(
    ("pods", "reason", "state", "told"),
    [
        (
            [ended(0, 78, last_words("FAILED", "loss is nan"))], "PodFailurePolicy", "FAILED", "loss is nan",
        ),
        ([ended(0, 2, json.dumps({"why": "no pod of cluster=kubernetes"}))], "PodFailurePolicy", "FAILED", "no pod of"),
        ([ended(1, 137, reason="OOMKilled")], "MaxFailedIndexesExceeded", "OUT_OF_MEMORY", "raise cluster.mem_gb"),
        ([], "DeadlineExceeded", "TIMEOUT", "cluster.time_min"),
        ([ended(0, 127, "exec: python: not found")], "PodFailurePolicy", "FAILED", "exec: python: not found"),
        (
            [ended(0, 130, last_words("CANCELLED", "cancel; saved"))], "PodFailurePolicy", "CANCELLED", "cancel; saved",
        ),
    ],
)  # fmt: skip
def test_how_it_failed(
    server: Server, tmp_path: Path, pods: list[dict[str, Any]], reason: str, state: str, told: str
) -> None:
    _, run = submitted(server, tmp_path)
    for one in pods:
        server.put("Pod", one)
    condition(server, "Failed", reason, "Container node for pod x failed")
    view = as_it_is(run)
    assert view.state.state == state and told in view.state.reason
    assert view.state.exit_code != 0


def test_an_api_that_is_away_makes_no_state(server: Server, tmp_path: Path) -> None:
    _, run = submitted(server, tmp_path)
    before = run.read_state()
    server.fails(f"get {JOBS}", 500, times=1)
    view = as_it_is(run)
    assert view.state.state == "UNKNOWN" and "Kubernetes does not answer: 500" in view.state.reason
    assert run.read_state() == before
    assert as_it_is(run).state.state == "PENDING"


def test_a_job_that_somebody_deletes(server: Server, tmp_path: Path) -> None:
    _, run = submitted(server, tmp_path)
    assert as_it_is(run).state.state == "PENDING"
    server.remove("Job", JOB)
    view = as_it_is(run)
    assert (view.state.state, view.state.reason) == (
        "CANCELLED",
        f"its Job {JOB} is gone: somebody has deleted it",
    )


def test_a_job_that_ended_and_was_cleaned_up_while_nobody_looked(server: Server, tmp_path: Path) -> None:
    _, run = submitted(server, tmp_path, ttl_s=0)
    server.remove("Job", JOB)
    view = as_it_is(run)
    assert view.state.state == "UNKNOWN" and "the run's directory on the volume tells" in view.state.reason
    assert run.read_state().state == "PENDING", "nothing is claimed"


# --- cancel ---------------------------------------------------------------------------------------------------


def test_cancel(server: Server, tmp_path: Path) -> None:
    _, run = submitted(server, tmp_path)
    said: list[str] = []
    (view,) = cancel([run], How(limit_s=5), said.append, poll_s=0.05)
    assert (view.state.state, view.state.reason) == ("CANCELLED", "cancelled"), said
    assert server.names("Job") == []
    assert wish.of(run) or run.read_state().state == "CANCELLED"


def test_cancel_while_the_api_is_away(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wish is kept, and the next look tells the cluster."""
    _, run = submitted(server, tmp_path)
    monkeypatch.setenv("HPCDL_SLURM_PATIENCE_S", "0")
    server.fails(f"get {JOBS}", 503, times=1)
    with pytest.raises(SchedulerError, match="wish to cancel is kept"):
        cancel([run], How(limit_s=5), lambda _: None, poll_s=0.05)
    assert server.names("Job") == [JOB]
    as_it_is(run)
    assert server.names("Job") == []
    assert as_it_is(run).state.state == "CANCELLED"


def test_a_sweep_is_a_job_a_point_and_is_refused_whole(server: Server, tmp_path: Path) -> None:
    made = claimed(tmp_path / "a", count=3)
    assert sending.send(made, kubernetes.BACKEND.render(made)) == f"tiny-{TOKEN}"
    assert server.names("Job") == [f"tiny-{TOKEN}-{i}" for i in range(3)]
    assert read_submission(tmp_path / "a", TOKEN)["sent"] is True


def test_a_sweep_is_refused_whole(server: Server, tmp_path: Path) -> None:
    made = claimed(tmp_path, count=3)
    last = f"tiny-{TOKEN}-2"
    server.put("Job", {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": last, "labels": {}}})
    with pytest.raises(SchedulerError, match="is not of this launch"):
        sending.send(made, kubernetes.BACKEND.render(made))
    assert server.names("Job") == [last], (
        "what had been made is taken back, what is somebody else's is not touched"
    )
    assert server.names("ConfigMap") == server.names("Service") == []


# --- logs -----------------------------------------------------------------------------------------------------


def test_what_pods_printed_is_shown_where_their_volume_is_not_seen(server: Server, tmp_path: Path) -> None:
    _, run = submitted(server, tmp_path)
    for index, time in ((0, "01"), (1, "00")):
        server.put("Pod", pod(index))
        line = f"2026-01-31T12:00:{time}.000+00:00 [rank {index}] hello {index}\n"
        path = f"get /api/v1/namespaces/{NAMESPACE}/pods/{JOB}-{index}-abcde/log"
        server.do(lambda handler, path=path, line=line: handler[path] << line.encode())
    lines: list[str] = []
    logs.show(run, logs.Wanted(), lines.append, lambda _: None)
    assert [line.split("] ")[1] for line in lines] == ["hello 1", "hello 0"], "in the order of their times"
    lines.clear()
    logs.show(run, logs.Wanted(node=f"{JOB}-1"), lines.append, lambda _: None)
    assert len(lines) == 1 and lines[0].endswith("hello 1")
