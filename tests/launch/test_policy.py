"""What is tried again and what is not: whole agents, with workers without torch."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from hpcdl.runs.kinds import NEVER_RESTART
from hpcdl.runs.store import RunDir
from tests.fake_slurm import FakeSlurm
from tests.launch.making import Agents, events

MONITOR = {"hang_factor": 4, "hang_min_s": 1, "hang_quiet_s": 60}


def make(agents: Agents, mode: str, monitor: dict[str, Any] | None = None, **spec: Any) -> RunDir:
    agents.cluster = spec
    run = agents.make(mode)
    more = {"monitor": monitor or {}, "preflight": {"name": "default", "disk_gb": None, "clock_s": 60}}
    run.spec_file.write_text(run.spec_file.read_text() + json.dumps(more)[1:-1].replace("}, ", "}\n") + "\n")
    return run


def test_a_hang_is_written_down_and_started_anew(agents: Agents) -> None:
    run = make(agents, "stall", MONITOR, max_restarts=1)
    code, said = agents.end(agents.start(), limit_s=60)
    state = run.read_state()
    assert (code, state.state, state.restarts) == (1, "FAILED", 1), said
    first, _ = events(agents, "hang")
    assert first["ranks"] == [1] and "after step 5 (limit 1 s" in first["message"]
    assert "in launch/tiny_worker.py:" in first["message"] and "stick" in first["message"]
    stacks = sorted(file.name for file in run.errors.glob("*-stacks.txt"))
    assert stacks == [f"try0.0-restart{n}-rank{r}-stacks.txt" for n in (0, 1) for r in (0, 1)]
    (again,) = events(agents, "restarting")
    assert (again["kind"], again["step"], again["why"]) == ("hang", 5, "restart in place 1 of 1")
    assert state.reason.startswith("Hang: no step for") and state.reason.endswith("(cluster.max_restarts)")
    assert "(rank 1, node" in state.reason


def test_a_torchrun_that_hangs_with_its_workers_is_ended_too(agents: Agents) -> None:
    run = make(agents, "stall", MONITOR)
    process = agents.start()
    agents.pids()
    os.kill(agents.torchrun(), signal.SIGSTOP)
    code, said = agents.end(process, limit_s=60)
    assert (code, run.read_state().state) == (1, "FAILED"), said
    assert run.read_state().reason.startswith("Hang: no step for")
    assert "torchrun takes no notice of its workers' end; ending it" in agents.log()


def test_the_same_step_again_and_again_ends_the_run(agents: Agents) -> None:
    run = make(agents, "same_step", max_restarts=10)
    assert agents.end(agents.start(), limit_s=60)[0] == NEVER_RESTART
    state = run.read_state()
    assert (state.state, state.restarts, state.exit_code) == ("FAILED", 2, NEVER_RESTART)
    assert state.reason.endswith("3 tries in a row ended by a worker's death at step 5, without progress")
    assert [event["step"] for event in events(agents, "restarting")] == [5, 5]


def test_a_job_that_was_put_back_after_the_end_does_nothing(agents: Agents) -> None:
    reason = "ValueError: x (rank 0, node n1); not tried again"
    run = make(agents, "finish", kind="slurm")
    run.update(state="FAILED", reason=reason, exit_code=NEVER_RESTART)
    code, said = agents.end(agents.node(0, 1))
    assert code == NEVER_RESTART and "is not tried again: ValueError: x" in said
    assert run.read_state().state == "FAILED" and not list(run.logs.glob("*"))


def test_a_node_that_is_not_fit_is_named_and_left_out(agents: Agents, cluster: FakeSlurm) -> None:
    run = make(agents, "hang", kind="slurm", nodes=2, processes_per_node=1, requeue="requeue")
    agents.meet_on_loopback = True
    agents.end(agents.job(2, UNFIT="n2"), limit_s=60)
    assert_left_out(agents, cluster, run, "n2")


def test_a_single_node_that_is_not_fit(agents: Agents, cluster: FakeSlurm) -> None:
    run = make(agents, "hang", kind="slurm", requeue="requeue")
    agents.end(agents.job(1, UNFIT="n1"))
    assert_left_out(agents, cluster, run, "n1")
    assert not list(run.path.glob("pid-*")), "no worker was started"


def test_where_nodes_may_not_be_left_out_the_run_ends(agents: Agents, cluster: FakeSlurm) -> None:
    run = make(agents, "hang", kind="slurm", requeue="requeue", exclude_failed_nodes=False)
    assert agents.end(agents.job(1, UNFIT="n1"))[0] == 1
    state = run.read_state()
    assert state.state == "FAILED"
    assert state.reason.endswith("node n1 is not fit, and the job can't be kept off it")


def assert_left_out(agents: Agents, cluster: FakeSlurm, run: RunDir, unfit: str) -> None:
    state = run.read_state()
    assert state.state == "PENDING", state.reason
    assert state.reason.startswith(f"NotFitError: preflight on node {unfit}: 0 MiB of memory are free")
    (event,) = events(agents, "requeued")
    assert (event["kind"], event["node"], event["exclude"]) == ("node", unfit, [unfit])
    update = [call["argv"] for call in cluster.calls("scontrol") if call["argv"][0] == "update"]
    assert update == [["update", "jobid=12_0", f"ExcNodeList={unfit}"]]
