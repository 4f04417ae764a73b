"""The agent with a stand-in for torchrun and workers without torch (test_torchrun_real.py has the real one)."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from hpcdl.launch import job
from hpcdl.runs.kinds import NEVER_RESTART
from tests.fake_slurm import FakeSlurm
from tests.launch.making import Agents, alive, until


def kinds(agents: Agents) -> list[str]:
    return [event["event"] for event in agents.run.events() if event["event"] != "preflight"]


def test_finished(agents: Agents) -> None:
    run = agents.make("finish")
    process = agents.start()
    assert agents.end(process) == (0, "")
    state = run.read_state()
    assert (state.state, state.exit_code, state.reason, state.job_id) == ("COMPLETED", 0, "", None)
    assert state.host == os.uname().nodename
    assert state.node_list == (os.uname().nodename,)
    assert state.agent_pid == process.pid
    assert state.started is not None and state.ended is not None
    assert state.started <= state.ended
    assert kinds(agents) == ["started", "finished"]
    assert next(e for e in run.events() if e["event"] == "started")["try"] == state.running_try == "0.0"
    assert run.events()[-1]["step"] == 7
    assert not [f for f in agents.runs_dir.iterdir() if f.name.startswith("hpcdl-torchrun-")]


def test_state_says_running_with_the_agents_own_birth(agents: Agents) -> None:
    psutil = pytest.importorskip("psutil")
    run = agents.make("hang")
    process = agents.start()
    until(lambda: run.read_state().state == "RUNNING", "the agent has started")
    state = run.read_state()
    assert state.agent_pid == process.pid
    assert state.agent_started == pytest.approx(psutil.Process(process.pid).create_time(), abs=1.1)


def test_each_line_has_time_and_rank(agents: Agents) -> None:
    agents.make("finish")
    agents.end(agents.start())
    lines = agents.lines()
    assert {m[2] for m in lines} == {"agent", "rank 0", "rank 1"}
    assert "[rank 1] hello 1" in agents.log()
    assert "[rank 0] to stderr" in agents.log()
    for line in lines:
        assert datetime.fromisoformat(line[1]).utcoffset() is not None
    name = f"{os.uname().nodename}-try0.0.log"
    assert [f.name for f in agents.run.logs.iterdir()] == [name]


def test_lines_are_in_the_log_while_the_run_goes_on(agents: Agents) -> None:
    agents.make("hang")
    agents.start()
    until(lambda: "[rank 1] hello 1" in agents.log(), "the worker's first line")
    assert agents.run.read_state().state == "RUNNING"


def test_a_failure_has_its_reason_and_traceback(agents: Agents) -> None:
    run = agents.make("fail")
    # torchrun alone would wait 30 s for the other worker, which takes its SIGTERM for a wish to save and stop.
    code, said = agents.end(agents.start(), limit_s=25)
    assert code == NEVER_RESTART
    state = run.read_state()
    host = os.uname().nodename
    assert (state.state, state.exit_code) == ("FAILED", NEVER_RESTART)
    assert state.reason.startswith(f"ValueError: the loss is nan (rank 1, node {host}); not tried again")
    event = run.events()[-1]
    assert event["event"] == "failed"
    assert "raise ValueError" in event["traceback"]
    assert "raise ValueError" in said
    assert "told to end 1 s ago" in agents.log()


def test_memory_that_ran_out_is_told_from_a_crash(agents: Agents) -> None:
    run = agents.make("starve")
    assert agents.end(agents.start(), limit_s=25)[0] == NEVER_RESTART
    state = run.read_state()
    assert (state.state, state.exit_code) == ("OUT_OF_MEMORY", NEVER_RESTART)
    assert state.reason.startswith("MemoryError (rank 1, node ")


def test_a_kill_by_the_kernel_is_memory_that_ran_out(agents: Agents, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "memory.events").write_text("oom 0\noom_kill 0\n")
    agents.environment["CGROUPS"] = str(tmp_path)
    run = agents.make("oom_kill")
    assert agents.end(agents.start(), limit_s=25)[0] == NEVER_RESTART
    state = run.read_state()
    assert state.state == "OUT_OF_MEMORY"
    assert state.reason.startswith("SIGKILL: killed by the kernel: the node's memory")


def test_a_killed_worker_is_named(agents: Agents) -> None:
    run = agents.make("die")
    assert agents.end(agents.start())[0] == 137
    state = run.read_state()
    assert state.state == "FAILED"
    assert state.reason.startswith("SIGKILL: killed; by the kernel if memory ran out (rank 1, node ")


def test_a_worker_that_just_exits(agents: Agents) -> None:
    run = agents.make("exit3")
    assert agents.end(agents.start())[0] == 3
    assert "ended with code 3 and said nothing (rank 1" in run.read_state().reason


def test_workers_that_leave_no_outcome_have_failed(agents: Agents) -> None:
    run = agents.make("silent")
    assert agents.end(agents.start())[0] == 1
    assert run.read_state().reason == "the workers ended without writing outcome.json"


def test_an_earlier_trys_outcome_does_not_count(agents: Agents) -> None:
    run = agents.make("silent", attempt=1)
    old = {"try": "0.0", "status": "finished", "reason": "", "step": 9}
    run.outcome_file.write_text(json.dumps(old))
    assert agents.end(agents.start())[0] == 1
    assert run.read_state().state == "FAILED"


def test_restart_in_place(agents: Agents) -> None:
    agents.cluster = {"max_restarts": 2}
    run = agents.make("once")
    assert agents.end(agents.start())[0] == 0
    state = run.read_state()
    assert (state.state, state.restarts) == ("COMPLETED", 1)
    (event,) = [e for e in run.events() if e["event"] == "restarting"]
    assert (event["in_place"], event["kind"], event["try"]) == ("torchrun", "killed", "0.0")
    assert event["reason"].startswith("SIGKILL: killed")
    assert "(rank 1, node " in event["reason"]


def test_a_fault_is_not_tried_again(agents: Agents) -> None:
    agents.cluster = {"max_restarts": 2}
    run = agents.make("fail")
    assert agents.end(agents.start(), limit_s=25)[0] == NEVER_RESTART
    assert run.read_state().restarts == 0
    assert "no restart in place: ValueError: the loss is nan" in agents.log()
    assert "restarting" not in kinds(agents)
    assert kinds(agents)[-1] == "failed"


def test_a_new_try_where_torchrun_has_given_up(agents: Agents) -> None:
    # Each try comes a step further: that is progress, so the one restart is there again.
    agents.cluster = {"max_restarts": 1}
    run = agents.make("further")
    assert agents.end(agents.start(), limit_s=60)[0] == 0
    state = run.read_state()
    assert (state.state, state.restarts, state.running_try) == ("COMPLETED", 3, "0.0.1")
    tries = [e["try"] for e in run.events() if e["event"] == "started"]
    assert tries == ["0.0", "0.0.1"]
    ways = [e["in_place"] for e in run.events() if e["event"] == "restarting"]
    assert ways == ["torchrun", "job", "torchrun"]
    assert (run.logs / f"{os.uname().nodename}-try0.0.1.log").exists()


def test_an_older_try_stops_and_writes_nothing(agents: Agents) -> None:
    run = agents.make("hang")
    process = agents.start()
    pids = agents.pids()
    run.update(running_try="0.1", reason="the newer one's")
    code, said = agents.end(process)
    assert code == 1
    assert "try 0.1 has taken the run over from try 0.0" in said
    assert not any(alive(pid) for pid in pids)
    assert (run.read_state().state, run.read_state().reason) == ("RUNNING", "the newer one's")
    assert kinds(agents) == ["started"]
    code, said = agents.end(agents.start())
    assert (code, "is at try 0.1 already" in said) == (1, True)


def test_the_reason_is_the_last_restarts(agents: Agents) -> None:
    agents.cluster = {"max_restarts": 1}
    run = agents.make("twice")
    assert agents.end(agents.start(), limit_s=60)[0] == 1
    reason = run.read_state().reason
    assert reason.startswith("ConnectionError: restart 1 (rank 1")
    assert reason.endswith("no restart is left (cluster.max_restarts)")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_stopped_by_a_signal(agents: Agents, number: signal.Signals) -> None:
    run = agents.make("wait")
    process = agents.start()
    agents.pids()
    process.send_signal(number)
    assert agents.end(process)[0] == 130
    state = run.read_state()
    assert (state.state, state.exit_code) == ("CANCELLED", 130)
    assert state.reason == f"stopped by {number.name}; checkpoint saved at step 7"
    assert kinds(agents) == ["started", "cancelled"]
    assert not run.stop_file.exists()


def test_workers_that_do_not_listen_yet_find_the_stop_file(agents: Agents) -> None:
    run = agents.make("deaf")
    process = agents.start()
    agents.pids()
    process.send_signal(signal.SIGINT)
    assert agents.end(process)[0] == 130
    assert run.read_state().state == "CANCELLED"


def test_a_second_interrupt_kills(agents: Agents) -> None:
    run = agents.make("hang")
    process = agents.start()
    pids = agents.pids()
    process.send_signal(signal.SIGINT)
    until(lambda: "got SIGINT" in agents.log(), "the first interrupt")
    assert all(alive(pid) for pid in pids)
    process.send_signal(signal.SIGINT)
    assert agents.end(process)[0] == 130
    assert run.read_state().reason == "killed by a second interrupt"
    assert not any(alive(pid) for pid in pids)


def test_cancelled_through_the_stop_file(agents: Agents) -> None:
    run = agents.make("wait")
    process = agents.start()
    agents.pids()
    run.stop_file.write_text("cancel\n")
    assert agents.end(process)[0] == 130
    assert run.read_state().state == "CANCELLED"
    assert run.events()[-1] == {
        "time": run.events()[-1]["time"],
        "event": "cancelled",
        "by": "cancel",
        "step": 7,
    }
    assert run.stop_file.read_text() == "cancel\n"  # the launcher's to remove


def test_an_earlier_signals_stop_file_is_removed(agents: Agents) -> None:
    run = agents.make("finish")
    run.stop_file.write_text("SIGUSR2\n")
    assert agents.end(agents.start())[0] == 0
    assert not run.stop_file.exists()


def test_kill_9_of_the_agent_leaves_no_orphan(agents: Agents) -> None:
    run = agents.make("hang")
    process = agents.start()
    pids = [*agents.pids(), agents.torchrun()]
    process.kill()
    until(lambda: not any(alive(pid) for pid in pids), "torchrun and the workers are gone")
    # What the next poll finds: RUNNING, and the pid of a process that is not there.
    assert run.read_state().state == "RUNNING"
    assert run.read_state().agent_pid == process.pid


def test_kill_9_of_torchrun_is_a_failure_without_orphans(agents: Agents) -> None:
    run = agents.make("hang")
    process = agents.start()
    pids = agents.pids()
    os.kill(agents.torchrun(), signal.SIGKILL)
    assert agents.end(process)[0] == 137
    assert not any(alive(pid) for pid in pids)
    state = run.read_state()
    assert (state.state, state.exit_code) == ("FAILED", 137)
    assert state.reason.startswith(f"SIGKILL: torchrun was killed (node {os.uname().nodename})")


def test_what_outlives_torchrun_is_ended(agents: Agents) -> None:
    agents.make("leak")
    assert agents.end(agents.start())[0] == 0
    for rank in (0, 1):
        assert not alive(int((agents.run.path / f"pid-helper-{rank}").read_text()))


def test_a_run_launched_again_is_not_touched_by_an_old_job(agents: Agents) -> None:
    run = agents.make("finish", submission="another")
    before = run.state_file.read_bytes()
    code, said = agents.end(agents.start())
    assert code == 1
    assert "has been launched again since" in said
    assert run.state_file.read_bytes() == before
    assert kinds(agents) == []


def test_a_completed_run_is_left_alone(agents: Agents) -> None:
    run = agents.make("fail", state="COMPLETED")
    assert agents.end(agents.start())[0] == 0
    assert run.read_state().state == "COMPLETED"


def test_a_run_directory_that_is_not_shared_is_said_before_torchrun_starts(agents: Agents) -> None:
    run = agents.make("finish")
    run.spec_file.unlink()
    code, said = agents.end(agents.start())
    assert code == 1
    assert "runs_dir must lie on a disk that all nodes share" in said
    assert run.read_state().state == "FAILED"
    assert "runs_dir must lie on a disk" in run.read_state().reason


def test_requeue_of_an_array_task(agents: Agents, slurm: FakeSlurm) -> None:
    agents.cluster = {"kind": "slurm"}
    run = agents.make("wait")
    slurm.set(job_show="JobId=12 ArrayJobId=12 JobState=RUNNING Reason=None Restarts=0 ExitCode=0:0")
    (slurm.folder / "tasks").mkdir()
    (slurm.folder / "tasks" / "12_0.json").write_text(
        '{"state": "RUNNING", "restarts": 0, "reason": "None", "comment": ""}'
    )
    process = agents.node(0, 1)
    pids = agents.pids()
    assert run.read_state().job_id == "12_0"
    os.kill(process.pid, signal.SIGUSR2)
    for pid in pids:  # Slurm signals every process of the step
        os.kill(pid, signal.SIGUSR2)
    assert agents.end(process)[0] == 0
    # Never the task's own job id: for one of the tasks it is the whole array's.
    assert [c["argv"] for c in slurm.calls("scontrol")] == [
        ["show", "job", "-o", "12_0"],
        ["show", "job", "-o", "12_0"],  # right before: somebody may have cancelled it meanwhile
        ["requeue", "12_0"],
    ]
    state = run.read_state()
    assert (state.state, state.requeues, state.exit_code) == ("PENDING", 1, None)
    assert run.events()[-1]["event"] == "requeued"
    assert slurm.task("12_0")["restarts"] == 1

    again = agents.node(0, 1, SLURM_RESTART_COUNT="1")
    until(lambda: run.read_state().state == "RUNNING", "the second try")
    assert run.read_state().requeues == 1
    assert not run.stop_file.exists()
    until(lambda: (run.logs / "n1-try0.1.log").exists(), "the second try's log")
    os.kill(again.pid, signal.SIGKILL)


def test_no_requeue_is_left(agents: Agents, slurm: FakeSlurm) -> None:
    agents.cluster = {"kind": "slurm", "max_requeues": 2}
    run = agents.make("wait")
    slurm.set(job_show="JobId=12 JobState=RUNNING Reason=None Restarts=2")
    for _ in range(2):
        run.event("requeued", kind="preempted", step=7, saved=7, reason="")
    process = agents.node(0, 1, SLURM_RESTART_COUNT="2")
    agents.pids()
    process.send_signal(signal.SIGUSR2)
    assert agents.end(process)[0] == 1
    assert run.read_state().state == "TIMEOUT"
    assert "no requeue is left (cluster.max_requeues=2 without progress)" in run.read_state().reason
    assert [c["argv"][0] for c in slurm.calls("scontrol")] == ["show"]


def test_a_refused_requeue_is_a_failure_with_slurms_words(agents: Agents, slurm: FakeSlurm) -> None:
    agents.cluster = {"kind": "slurm"}
    run = agents.make("wait")
    slurm.set(
        job_show="JobId=12 JobState=RUNNING Restarts=0", requeue_refused="Requested operation is disabled"
    )
    process = agents.node(0, 1)
    agents.pids()
    process.send_signal(signal.SIGUSR2)
    assert agents.end(process)[0] == 1
    assert run.read_state().state == "TIMEOUT"
    assert "not requeued: Requested operation is disabled" in run.read_state().reason


@pytest.mark.parametrize(
    ("show", "state", "requeues"),
    [
        ("JobState=COMPLETING Reason=None Restarts=0 ExitCode=0:15", "CANCELLED", 0),
        ("JobState=COMPLETING Reason=None Restarts=1 ExitCode=0:0", "PENDING", 1),
    ],
    ids=["scancel", "preempted"],
)
def test_ended_by_slurm(agents: Agents, slurm: FakeSlurm, show: str, state: str, requeues: int) -> None:
    agents.cluster = {"kind": "slurm"}
    run = agents.make("wait")
    slurm.set(job_show=f"JobId=12 {show}")
    process = agents.node(0, 1)
    agents.pids()
    process.send_signal(signal.SIGTERM)
    agents.end(process)
    assert (run.read_state().state, run.read_state().requeues) == (state, requeues)
    assert "requeue" not in [c["argv"][0] for c in slurm.calls("scontrol")]


def test_the_other_nodes_agent_only_speaks_after_the_first(agents: Agents) -> None:
    agents.cluster = {"kind": "slurm", "nodes": 2, "processes_per_node": 1}
    run = agents.make("die")  # rank 1 is the second node's
    agents.meet_on_loopback = True
    second = agents.node(1, 2)
    until(lambda: list(run.errors.glob("try0.0-node1.json")), "the second node's view")
    time.sleep(0.3)
    assert second.poll() is None  # srun would kill the first node's agent now
    run.update(state="RUNNING")
    time.sleep(0.3)
    assert second.poll() is None
    run.update(state="FAILED")
    assert agents.end(second)[0] == 1
    view = json.loads((run.errors / "try0.0-node1.json").read_text())
    assert (view["type"], view["rank"], view["node"]) == ("SIGKILL", 1, "n2")


def test_a_node_that_can_not_start_ends_the_first_ones_wait(agents: Agents) -> None:
    agents.cluster = {"kind": "slurm", "nodes": 2, "processes_per_node": 1}
    run = agents.make("hang")
    agents.meet_on_loopback = True
    first = agents.node(0, 2)
    until(lambda: (run.path / "pid-0").exists(), "the first node's worker")
    # The second node's agent has found its disk full; srun sends SIGTERM to the rest.
    plain = {
        "time": "2026-01-31T12:00:00.000+00:00",
        "node": "n2",
        "type": "RunFailedError",
        "message": "full",
    }
    (run.errors / "try0.0-node1.json").write_text(json.dumps(plain))
    first.send_signal(signal.SIGTERM)
    assert agents.end(first)[0] == NEVER_RESTART
    assert run.read_state().reason.startswith("RunFailedError: full (node n2)")


def test_the_loopback_is_refused_between_nodes(agents: Agents) -> None:
    agents.cluster = {"kind": "slurm", "nodes": 2}
    run = agents.make("finish")
    code, said = agents.end(agents.node(0, 2))
    assert code == NEVER_RESTART
    assert "127.0.0.1 is a loopback address" in said
    assert run.read_state().state == "FAILED"


def test_a_job_of_another_size_is_refused(agents: Agents) -> None:
    agents.cluster = {"kind": "slurm", "nodes": 2}
    run = agents.make("finish")
    assert agents.end(agents.node(0, 1))[0] == NEVER_RESTART
    assert "the run wants 2 nodes, the job has 1" in run.read_state().reason


def test_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert job.main([]) == 2
    assert "usage: python -m hpcdl.launch.job" in capsys.readouterr().err
    (tmp_path / "runs.txt").write_text("/a\n")
    assert job.main([str(tmp_path / "runs.txt"), "1"]) == 2
    assert "has 1 runs; there is no number 1" in capsys.readouterr().err
    assert job.main([str(tmp_path / "none.txt"), "0"]) == 1


def test_the_agent_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, hpcdl.launch.job; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "numpy", "hydra", "omegaconf", "pydantic", "submitit", "rich", "psutil", "asyncio"}
    assert not heavy & set(found)
