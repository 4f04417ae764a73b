from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcdl.errors import UsageError
from hpcdl.launch.place import find

RUNS = Path("/runs/.submissions/tok/runs.txt")
ARRAY = {
    "SLURM_JOB_ID": "17",
    "SLURM_ARRAY_JOB_ID": "15",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "c2",
    "SLURM_STEP_ID": "0",
    "HPCDL_NODES": "c1 c2",
    "HPCDL_HEAD": "10.0.0.1",
    "HPCDL_PORT": "20119",
}


def test_a_node_of_an_array_task() -> None:
    place = find(RUNS, None, ARRAY)
    assert (place.kind, place.index, place.node, place.name, place.nodes) == (
        "slurm",
        1,
        1,
        "c2",
        ("c1", "c2"),
    )
    assert place.job_id == "15_1"
    assert place.rendezvous_id == "17.0-0"
    assert (place.head, place.port, place.token, place.first) == ("10.0.0.1", 20119, "tok", False)


def test_tries_of_a_job_never_meet() -> None:
    again = find(RUNS, None, {**ARRAY, "SLURM_RESTART_COUNT": "2"})
    assert again.requeue == 2
    assert again.rendezvous_id != find(RUNS, None, ARRAY).rendezvous_id
    assert find(RUNS, None, {**ARRAY, "SLURM_STEP_ID": "1"}).rendezvous_id != again.rendezvous_id


def test_a_job_that_is_no_array() -> None:
    place = find(RUNS, None, {"SLURM_JOB_ID": "17", "SLURMD_NODENAME": "c2"})
    assert (place.job_id, place.index, place.nodes, place.head, place.first) == ("17", 0, ("c2",), None, True)


def test_several_nodes_need_a_head() -> None:
    with pytest.raises(UsageError, match="HPCDL_HEAD is not set"):
        find(RUNS, None, {**ARRAY, "HPCDL_HEAD": ""})


@pytest.mark.parametrize("environment", [{}, {**ARRAY, "HPCDL_LOCAL": "1"}], ids=["login", "inside a job"])
def test_this_machine(environment: dict[str, str]) -> None:
    place = find(RUNS, 4, environment)
    assert (place.kind, place.index, place.job_id, place.first) == ("local", 4, None, True)
    assert place.nodes == (os.uname().nodename,)
