"""The monitor in a real agent: every process of the run is in its node's file, and nothing of it disturbs the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from hpcdl.monitor import records
from hpcdl.monitor.records import NodeSample
from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import dump_yaml, load_yaml
from tests.launch.making import Agents, until

MONITOR = {"name": "default", "every_s": 0.1, "pss_every_s": 0.1, "mb_per_day": 1000}


def monitored(agents: Agents, mode: str, **monitor: Any) -> RunDir:
    run = agents.make(mode)
    run.spec_file.write_text(dump_yaml({**load_yaml(run.spec_file), "monitor": {**MONITOR, **monitor}}))
    return run


def sampled(run: RunDir, node: str, fits: Callable[[NodeSample], Any]) -> NodeSample:
    """The first sample that fits."""
    return until(lambda: next(filter(fits, records.read(run, node)), None), "such a sample")


def test_all_ranks_and_loaders_are_in_the_file_and_steps_go_on(agents: Agents) -> None:
    run = monitored(agents, "load")
    process, node = agents.start(), os.uname().nodename
    pids = agents.pids()
    sample = sampled(
        run, node, lambda one: len(one.processes) == 8 and all((rank.step or 0) > 2 for rank in one.ranks)
    )
    later = sampled(
        run,
        node,
        lambda one: (
            one.time > sample.time and all((r.step or 0) > (sample.ranks[0].step or 0) for r in one.ranks)
        ),
    )
    (run.path / "enough").touch()
    assert agents.end(process) == (0, "")
    assert [(rank.rank, rank.pid, rank.phase) for rank in sample.ranks] == [
        (0, pids[0], "step"),
        (1, pids[1], "step"),
    ]
    loaders = [(one.role, one.rank) for one in sample.processes if one.role == "loader"]
    assert loaders == [("loader", 0)] * 2 + [("loader", 1)] * 2
    assert [one.role for one in sample.processes[6:]] == ["torchrun", "agent"]
    assert sample.processes[-1].pid == process.pid and later.time > sample.time
    assert all(one.rss_bytes > 1 << 20 and one.threads and one.open_files for one in sample.processes)
    assert (sample.attempt, sample.node) == ("0.0", node)
    first = next(records.read(run, node))
    assert len(first.processes) < 8, "it begins before the workers do"
    assert not [event for event in run.events() if event["event"] == "warning"], "nothing is the matter"


def test_each_node_writes_what_its_own_ranks_do(agents: Agents) -> None:
    agents.cluster = {"kind": "slurm", "nodes": 2, "processes_per_node": 2}
    agents.meet_on_loopback = True
    run = monitored(agents, "load")
    nodes = [agents.node(number, 2) for number in range(2)]
    pids = agents.pids(4)
    for node, ranks in (("n1", (0, 1)), ("n2", (2, 3))):
        sample = sampled(run, node, lambda one: [rank.step is not None for rank in one.ranks] == [True, True])
        assert [(rank.rank, rank.pid) for rank in sample.ranks] == [(rank, pids[rank]) for rank in ranks]
    assert records.nodes(run) == ["n1", "n2"]
    (run.path / "enough").touch()
    for agent in nodes:
        assert agents.end(agent) == (0, "")


@pytest.mark.parametrize("monitor", [{"name": "none"}, {"name": "default", "every_s": 0.05}])
def test_a_run_ends_as_without_it(agents: Agents, monitor: dict[str, Any]) -> None:
    run = monitored(agents, "finish", **monitor)
    assert agents.end(agents.start()) == (0, "")
    assert bool(records.nodes(run)) == (monitor["name"] == "default")


def test_a_file_that_cannot_be_written_is_told_once_and_ends_nothing(agents: Agents) -> None:
    run = monitored(agents, "finish", every_s=0.01)
    node = os.uname().nodename
    records.file_of(run, node).symlink_to(run.path / "elsewhere")
    assert agents.end(agents.start()) == (0, "")
    told = [event["message"] for event in run.events() if event["event"] == "warning"]
    assert len(told) == 1 and f"monitor on node {node}" in told[0] and "symbolic link" in told[0]
    assert not (run.path / "elsewhere").exists()
