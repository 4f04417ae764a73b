"""cluster.min_nodes: what is checked before submission, and the lines that it changes in the script."""

from __future__ import annotations

from typing import Any

import pytest

from hpcdl import experiment
from hpcdl.launch.slurm import BACKEND
from tests.factory import tiny_plain
from tests.launch.making import request

FITS = {"trainer__global_batch_size": 12, "trainer__micro_batch_size": 1}


def faults(**dotted: Any) -> list[str]:
    found = experiment.check(tiny_plain(cluster__kind="slurm", **dotted)).faults
    return [f"{fault.key}: {fault.problem}; {fault.fix}" for fault in found]


def test_every_size_in_between_is_checked() -> None:
    assert faults(cluster__nodes=4, cluster__min_nodes=1, **FITS) == []
    (fault,) = faults(cluster__nodes=4, cluster__min_nodes=2)
    assert fault.startswith("cluster.min_nodes: with 3 of 4 nodes trainer.global_batch_size=8 can't be: ")
    assert fault.endswith("cluster.min_nodes=null")


def test_degrees_that_need_all_nodes_can_not_lose_one() -> None:
    (fault,) = faults(cluster__nodes=2, cluster__min_nodes=1, parallel={"name": "tp", "tp": 2}, **FITS)
    assert fault.startswith("cluster.min_nodes: with 1 of 2 nodes cluster.processes_per_node=1 can't be: ")


@pytest.mark.parametrize(
    ("cluster", "problem"),
    [
        ({"cluster__nodes": 2, "cluster__min_nodes": 3}, "the run has cluster.nodes=2; cluster.min_nodes=2"),
        ({"cluster__kind": "local", "cluster__min_nodes": 1}, "only Slurm's jobs have nodes to lose"),
    ],
)
def test_bounds(cluster: dict[str, Any], problem: str) -> None:
    found = experiment.check(tiny_plain(**{"cluster__kind": "slurm", **cluster})).faults
    assert [fault.key for fault in found] == ["cluster.min_nodes"]
    assert problem in f"{found[0].problem}; {found[0].fix}"


def test_the_job_may_start_smaller_and_outlives_a_node() -> None:
    elastic = BACKEND.render(request(nodes=4, min_nodes=2))
    assert "#SBATCH --nodes=2-4\n" in elastic and "#SBATCH --no-kill\n" in elastic
    assert "#SBATCH --ntasks-per-node" not in elastic.partition("# ----")[0]
    for fixed in (request(nodes=4), request(nodes=4, min_nodes=4)):
        text = BACKEND.render(fixed)
        assert "#SBATCH --nodes=4\n" in text and "--no-kill" not in text.partition("# ----")[0]
