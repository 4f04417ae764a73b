"""The pods of a manifest's Job, run as processes under its own podFailurePolicy: what each end of one leads to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests.kubernetes.making import Controller

Job = Callable[..., Controller]


def test_a_run_that_finishes(job: Job) -> None:
    one = job("finish")
    one.begin()
    assert one.finish() == "Complete", one.logs()
    state = one.run.read_state()
    assert (state.state, state.requeues, state.running_try, state.world_size) == ("COMPLETED", 0, "0.0", 2)
    assert state.job_id == "tiny-0123456789ab-0" and state.node_list == (
        f"{state.job_id}-0",
        f"{state.job_id}-1",
    )
    assert "hello 0" in one.logs(), "what the ranks say is the container's output, too"
    assert '"state": "COMPLETED"' in next(one.folder.glob("pod-0-*/termination-log")).read_text()


def test_a_preempted_pod_saves_and_is_waited_for(job: Job) -> None:
    """Kubernetes takes one pod away. All ranks save; the other pod keeps its place, and both go on in another try."""
    one = job("wait")
    one.begin()
    one.pids(2)
    one.until("the run runs", lambda: one.run.read_state().state == "RUNNING")
    first = one.pods[0].pid
    one.disrupt(1)
    one.until("another try", lambda: one.run.read_state().running_try == "0.1")
    (event,) = one.events("requeued")
    assert (event["kind"], event["way"]) == ("preempted", "pods") and "checkpoint saved at step 7" in event[
        "reason"
    ]
    assert one.codes == [(1, 75)] and one.failures == {} and one.pods[0].pid == first
    one.run.stop_file.write_text("cancel me\n")
    assert one.finish() == "Failed: PodFailurePolicy"
    assert one.run.read_state().state == "CANCELLED" and one.codes[-1][1] == 130


def test_the_first_pod_is_killed_with_its_node(job: Job) -> None:
    """Nobody says why. The new first pod tells of it, and the other one follows into the next try."""
    one = job("wait")
    one.begin()
    one.pids(2)
    one.until("the run runs", lambda: one.run.read_state().state == "RUNNING")
    os.killpg(one.pods[0].pid, signal.SIGKILL)
    other = one.pods[1].pid
    one.until("another try", lambda: one.run.read_state().running_try == "0.1")
    (event,) = one.events("lost")
    assert "left no last word" in event["message"] and "Slurm" not in event["message"]
    one.until("both have joined", lambda: (one.run.path / ".pods" / "0.1-1").exists())
    assert one.failures == {0: 1} and one.pods[1].pid == other
    one.disrupt(0)
    one.disrupt(1)  # the whole Job is deleted, or Kueue takes its place away
    one.until("told to end", lambda: [code for _, code in one.codes[1:]] == [75, 75])
    assert [e["kind"] for e in one.events("requeued")] == ["preempted"]


def test_a_fault_of_the_code_fails_the_job_at_once(job: Job) -> None:
    one = job("fail", max_restarts=1)
    one.begin()
    assert one.finish() == "Failed: PodFailurePolicy", one.logs()
    state = one.run.read_state()
    assert state.state == "FAILED" and "ValueError: the loss is nan" in state.reason
    assert one.codes[0][1] == 78 and one.failures == {}


def test_a_lost_pod_without_an_end(job: Job) -> None:
    """A pod that is killed again and again without any progress ends the run by its own rules."""
    one = job("wait", max_requeues=1)
    one.begin()
    for number in range(2):
        log = one.run.logs / f"tiny-0123456789ab-0-0-try0.{number}.log"
        one.until(f"try {number}", lambda log=log: log.exists() and "hears node" in log.read_text())
        os.killpg(one.pods[1].pid, signal.SIGKILL)
        if number == 0:
            one.until("it is made anew", lambda: one.run.read_state().running_try == "0.1")
    assert one.finish().startswith("Failed"), one.logs()
    state = one.run.read_state()
    assert state.state in ("FAILED", "NODE_FAIL") and "no requeue is left" in state.reason, state
