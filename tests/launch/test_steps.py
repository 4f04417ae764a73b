"""A node, an agent or srun itself is lost under a job on the fake Slurm: what its first node does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hpcdl.launch import causes, nodes, steps
from hpcdl.runs.store import now
from tests.fake_slurm import FakeSlurm
from tests.launch.making import ANSWERS, SILENT, Agents, alive, events, job_show, until


def agents_of(supervisor: subprocess.Popen[str]) -> tuple[int, list[int]]:
    """Process ids of srun and of the agents that it has started."""

    def children(pid: int) -> list[int]:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    (srun,) = until(lambda: children(supervisor.pid), "srun has started")
    return srun, children(srun)


def begun(agents: Agents, mode: str, of_nodes: int = 1, **spec: Any) -> subprocess.Popen[str]:
    """A job whose first agent and whose workers have begun; `agents.run` is its run."""
    agents.cluster = {"kind": "slurm", **spec}
    run = agents.make(mode)
    job = agents.job(of_nodes)
    agents.pids()
    until(lambda: run.read_state().state == "RUNNING", "the first agent has begun")
    return job


def test_srun_that_ends_well_is_all(agents: Agents, cluster: FakeSlurm) -> None:
    agents.cluster = {"kind": "slurm"}
    agents.make("finish")
    assert agents.end(agents.job(1)) == (0, "")
    (call,) = cluster.calls("srun")
    assert call["environment"]["HPCDL_AGAIN"] == "0"


def test_a_killed_agent_is_followed_by_another_try_in_the_same_job(
    agents: Agents, cluster: FakeSlurm
) -> None:
    job = begun(agents, "again", max_restarts=1)
    pids = agents.pids()
    os.kill(agents_of(job)[1][0], signal.SIGKILL)
    code, said = agents.end(job)
    assert code == 0, said
    state = agents.run.read_state()
    assert (state.state, state.restarts, state.requeues) == ("COMPLETED", 1, 0)
    assert not any(alive(pid) for pid in pids)
    assert [e["try"] for e in events(agents, "started")] == ["0.0", "0.0.1"]
    (event,) = events(agents, "restarting")
    assert (event["in_place"], event["nodes"], event["kind"]) == ("job", ["n1"], "killed")
    assert event["reason"].startswith("SIGKILL: its agent was killed")
    first, second = cluster.calls("srun")
    assert second["argv"][-7:-3] == ["--ntasks=1", "--nodelist=n1", "--overlap", "--mem=0"]
    assert "--overlap" not in first["argv"]


def test_without_restarts_a_killed_agents_job_is_requeued(agents: Agents, cluster: FakeSlurm) -> None:
    job = begun(agents, "hang", requeue="requeue")
    os.kill(agents_of(job)[1][0], signal.SIGKILL)
    agents.end(job)
    state = agents.run.read_state()
    assert (state.state, state.requeues) == ("PENDING", 1)
    assert cluster.task("12_0")["restarts"] == 1
    (event,) = events(agents, "requeued")
    assert (event["kind"], "exclude" in event) == ("killed", False)


def test_srun_killed_with_the_agent(agents: Agents, cluster: FakeSlurm) -> None:
    job = begun(agents, "again", max_restarts=1)
    srun, (agent,) = agents_of(job)
    os.kill(srun, signal.SIGKILL)
    os.kill(agent, signal.SIGKILL)
    assert agents.end(job)[0] == 0
    assert agents.run.read_state().restarts == 1


def test_an_srun_that_waits_for_a_dead_node_is_not_waited_for(agents: Agents, cluster: FakeSlurm) -> None:
    job = begun(agents, "again", max_restarts=1)
    srun, (agent,) = agents_of(job)
    os.kill(srun, signal.SIGSTOP)  # it takes no notice of the agent's end
    began = time.monotonic()
    until(lambda: time.monotonic() > began + 3 * steps._LOOK_S, "the agent has been seen")
    os.kill(agent, signal.SIGKILL)
    code, said = agents.end(job, limit_s=60)
    assert code == 0, said
    assert "the first node's agent is gone: srun is killed" in said


def both_hear(agents: Agents, mode: str, **spec: Any) -> subprocess.Popen[str]:
    """A job on two nodes whose agents know of each other."""
    agents.meet_on_loopback = True
    job = begun(agents, mode, 2, nodes=2, processes_per_node=1, **spec)
    log = agents.run.logs / "n1-try0.0.log"
    until(lambda: "hears node n2" in log.read_text(), "the agents hear of each other")
    return job


def lose_a_node(agents: Agents, cluster: FakeSlurm, mode: str, **spec: Any) -> tuple[int, str]:
    """Two nodes; the second one's agent is killed, and the node doesn't answer any more."""
    job = both_hear(agents, mode, requeue="requeue", **spec)
    addresses = {"n1": ANSWERS, "n2": SILENT, "n3": ANSWERS}
    cluster.set(addresses=addresses)
    os.kill(agents_of(job)[1][1], signal.SIGKILL)
    return agents.end(job)


def test_a_lost_node_is_named_and_excluded(agents: Agents, cluster: FakeSlurm) -> None:
    lose_a_node(agents, cluster, "hang", max_restarts=3)
    state = agents.run.read_state()
    assert state.state == "PENDING", state
    assert state.reason.startswith(
        "NodeLost: the node is lost: the connection to its agent broke; its slurmd "
    )
    (event,) = events(agents, "requeued")
    assert (event["node"], event["exclude"], event["kind"]) == ("n2", ["n2"], "node")
    update = [c["argv"] for c in cluster.calls("scontrol") if c["argv"][0] == "update"]
    assert update == [["update", "jobid=12_0", "ExcNodeList=n2"]]


def test_the_first_node_is_lost_and_the_next_one_speaks(agents: Agents, cluster: FakeSlurm) -> None:
    """With its batch script; Slurm would take minutes, and with --no-kill (min_nodes) never do anything."""
    job = both_hear(agents, "hang", requeue="requeue", min_nodes=1)
    srun, (first, second) = agents_of(job)
    cluster.set(addresses={"n1": SILENT, "n2": ANSWERS, "n3": ANSWERS})
    for pid in (job.pid, srun, first):
        os.kill(pid, signal.SIGKILL)
    agents.end(job)
    until(lambda: not alive(second), "the second agent has spoken")
    state = agents.run.read_state()
    assert (state.state, state.job_id, state.requeues) == ("PENDING", "12_0", 1)
    (event,) = events(agents, "requeued")
    assert (event["node"], event["exclude"], event["way"]) == ("n1", ["n1"], "requeue")
    assert ["requeue", "12_0"] in [call["argv"] for call in cluster.calls("scontrol")]


def test_a_node_that_is_cut_off_itself_says_nothing(agents: Agents, cluster: FakeSlurm) -> None:
    job = both_hear(agents, "hang", requeue="requeue")
    srun, (first, second) = agents_of(job)
    cluster.set(down=True, addresses={"n1": SILENT})
    for pid in (job.pid, srun, first):
        os.kill(pid, signal.SIGKILL)
    agents.end(job)
    until(lambda: not alive(second), "the second agent has ended")
    assert agents.run.read_state().state == "RUNNING"
    assert not events(agents, "requeued")


def test_the_run_goes_on_with_fewer_nodes(agents: Agents, cluster: FakeSlurm) -> None:
    code, said = lose_a_node(agents, cluster, "again", max_restarts=1, min_nodes=1)
    assert code == 0, said
    state = agents.run.read_state()
    assert (state.state, state.restarts, state.requeues) == ("COMPLETED", 1, 0)
    assert (state.nodes, state.world_size, state.node_list) == (1, 1, ("n1",))
    (event,) = events(agents, "restarting")
    assert (event["node"], event["nodes"]) == ("n2", ["n1"])
    assert cluster.calls("srun")[1]["argv"][-8:-3] == [
        "--nodes=1",
        "--ntasks=1",
        "--nodelist=n1",
        "--overlap",
        "--mem=0",
    ]


def test_torchrun_killed_on_another_node(agents: Agents, cluster: FakeSlurm) -> None:
    """The first node's workers notice nothing of it: they hang. Its agent is told by the other one's."""
    job = both_hear(agents, "again", max_restarts=1)
    second = agents_of(job)[1][1]
    (torchrun,) = Path(f"/proc/{second}/task/{second}/children").read_text().split()
    os.kill(int(torchrun), signal.SIGKILL)
    code, said = agents.end(job)
    assert code == 0, said
    (event,) = events(agents, "restarting")
    assert (event["in_place"], event["nodes"]) == ("job", ["n1", "n2"])
    assert event["reason"] == "SIGKILL: torchrun was killed (node n2)"


def test_a_node_on_which_srun_can_start_nothing(agents: Agents, cluster: FakeSlurm) -> None:
    agents.cluster = {"kind": "slurm", "nodes": 2, "processes_per_node": 1, "requeue": "requeue"}
    run = agents.make("hang")
    cluster.set(srun_exit=1)
    agents.end(agents.job(2, HPCDL_NODES="n1 n4"))
    assert run.read_state().state == "PENDING"
    (event,) = events(agents, "requeued")
    assert (event["node"], event["exclude"]) == ("n4", ["n4"])


def test_srun_ends_the_first_agent_before_it_has_begun(agents: Agents, cluster: FakeSlurm) -> None:
    """--kill-on-bad-exit: another node's agent has ended at once, and what it said is all that there is."""
    agents.cluster = {"kind": "slurm", "nodes": 2, "processes_per_node": 1, "requeue": "requeue"}
    run = agents.make("hang")
    unfit = causes.Cause(time=now(), type="NotFitError", message="no memory", node="n2", told="node")
    causes.record(run, "0.0", 1, unfit)
    cluster.set(srun_exit=1, addresses={"n1": ANSWERS, "n2": ANSWERS})
    agents.end(agents.job(2))
    assert run.read_state().state == "PENDING"
    (event,) = events(agents, "requeued")
    assert (event["kind"], event["node"], event["exclude"]) == ("node", "n2", ["n2"])


def test_a_step_that_slurm_refuses(agents: Agents, cluster: FakeSlurm) -> None:
    job = begun(agents, "again", max_restarts=1, requeue="requeue")
    cluster.set(srun_exit=1)
    os.kill(agents_of(job)[1][0], signal.SIGKILL)
    agents.end(job)
    assert agents.run.read_state().state == "PENDING"
    (event,) = events(agents, "requeued")
    assert event["reason"] == "ExitCode: srun could not start the next try (exit code 1) (node n1)"


def test_a_job_that_slurm_ends_is_left_alone(agents: Agents, cluster: FakeSlurm) -> None:
    job = begun(agents, "hang", max_restarts=3)
    cluster.set(job_show=job_show(JobState="COMPLETING"))
    os.kill(agents_of(job)[1][0], signal.SIGKILL)
    agents.end(job)
    assert agents.run.read_state().state == "CANCELLED"
    assert len(cluster.calls("srun")) == 1


@pytest.mark.parametrize(
    ("show", "needed", "excluded", "refused"),
    [
        ({}, 2, ("n2",), ""),
        ({"ExcNodeList": "n[3-4]"}, 1, ("n2",), ""),
        ({"ExcNodeList": "n[3-4]"}, 2, (), "the partition has 1 other nodes, and the job needs 2"),
        ({"ReqNodeList": "n2"}, 1, (), "n2: the job asks for it by name"),
    ],
)
def test_exclusion_leaves_the_job_nodes_enough(
    cluster: FakeSlurm, show: dict[str, str], needed: int, excluded: tuple[str, ...], refused: str
) -> None:
    cluster.set(job_show=job_show(**show))
    done = nodes.exclude("12_0", ["n2"], needed)
    assert done.excluded == excluded
    assert done.refused.startswith(refused) and bool(done.refused) == bool(refused)


def test_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert steps.main([]) == 2
    assert steps.main([str(tmp_path), "--"]) == 2
    assert "usage: python -m hpcdl.launch.steps" in capsys.readouterr().err
    assert steps.main([str(tmp_path / "none.txt"), "0", "--", "srun"]) == 1
