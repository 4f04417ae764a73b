"""Faults at random while three runs train: nothing is lost, and the losses are those of undisturbed runs.

HPCDL_SLOW=1 HPCDL_CHAOS_SEED=7 HPCDL_CHAOS_FAULTS=24 python -m pytest -s tests/chaos
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from tests.chaos.faults import FAULTS, NODE, TORN, WORKER
from tests.chaos.story import Chapter, Story, plan, table
from tests.slurm.cluster import Cluster

SEED = int(os.environ.get("HPCDL_CHAOS_SEED", "5"))
LENGTH = int(os.environ.get("HPCDL_CHAOS_FAULTS", str(len(FAULTS))))
ONLY = os.environ.get("HPCDL_CHAOS_ONLY", "")
"""Names of faults, with commas: of the sequence, only these."""
SHORT = (Chapter(WORKER, 0, 0), Chapter(NODE, 1, 1), Chapter(TORN, 2, 1))


def tell(cluster: Cluster, chapters: Sequence[Chapter], title: str) -> None:
    """The whole story; the table is printed also where it ends badly."""
    story = Story(cluster, len(chapters))
    version = cluster.shell("scontrol --version").strip()
    try:
        story.begin()
        for chapter in chapters:
            story.tell(chapter)
    finally:
        print("\n" + table(f"{title}, {version}", story.told, len(chapters)))
    story.end()
    assert all(each.recovered_s for each in story.told), "every fault was tried while its run trained"


def test_a_plan_is_the_seeds() -> None:
    assert plan(3, 30) == plan(3, 30) != plan(4, 30)
    assert {chapter.fault.name for chapter in plan(3, len(FAULTS))} == {fault.name for fault in FAULTS}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_worker_a_node_and_a_checkpoint(cluster: Cluster) -> None:
    tell(cluster, SHORT, "short")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_fault_in_a_random_order(cluster: Cluster) -> None:
    chapters = [one for one in plan(SEED, LENGTH) if not ONLY or one.fault.name in ONLY.split(",")]
    tell(cluster, chapters, f"seed {SEED}{f', only {ONLY}' if ONLY else ''}")
