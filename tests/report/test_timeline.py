"""Events → tries, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest

from hpcdl.report import cost, timeline
from hpcdl.report.cost import Prices
from hpcdl.report.timeline import Try
from tests.report.making import FAULT, STORY, at

CLUSTER = {"processes_per_node": 2, "cpus_per_process": 4, "gpus_per_node": 2}


def tries(*events: tuple[float, str, dict[str, Any]], until: float = 200, active: bool = False) -> list[Try]:
    return timeline.read(
        [{"time": at(s), "event": kind, **details} for s, kind, details in events],
        [],
        at(until),
        active=active,
    )


def seconds(one: Try) -> dict[str, float]:
    return {kind: one.seconds(kind) for kind in ("queued", "starting", "running", "lost")}


def test_a_requeue_makes_two_tries_and_what_was_not_saved_is_lost() -> None:
    first, second = tries(*STORY)
    assert seconds(first) == {
        "queued": 60,
        "starting": 20,
        "running": 28,
        "lost": 8,
    }  # the checkpoint was at 100
    assert seconds(second) == {"queued": 60, "starting": 10, "running": 22, "lost": 0}
    assert (first.number, first.node_list, first.outcome, first.last_step) == (
        "0.0",
        ("c1", "c2"),
        "requeued",
        14,
    )
    assert (second.first_step, second.last_step, second.outcome) == (10, 20, "finished")
    assert first.reason == "SIGKILL: killed (rank 3, node c2)"
    (fault,) = [mark for mark in first.marks if mark.kind == "fault"]
    assert (fault.step, fault.text) == (
        14,
        "requeued at step 14: SIGKILL: killed (rank 3, node c2); requeue 1 of 3",
    )


def test_a_restart_in_place_is_one_try_with_two_starts() -> None:
    (one,) = tries(
        (0, "submitted", {}),
        (0, "started", {"try": "0.0", "nodes": 1, "node_list": ["c1"]}),
        (10, "loaded", {}),
        (50, "restarting", {**FAULT, "in_place": "torchrun"}),
        (65, "loaded", {}),
        (65, "restarted", {"restart": 1}),
        (100, "finished", {"step": 20}),
    )
    assert seconds(one) == {"queued": 0, "starting": 25, "running": 75, "lost": 40}  # there was no checkpoint
    made = cost.of_tries([one], CLUSTER, Prices())
    assert made.cpu_hours == pytest.approx(100 / 3600 * 8)
    assert made.lost_cpu_hours == pytest.approx((40 + 15) / 3600 * 8)


def test_a_restart_by_the_job_is_another_try_that_did_not_wait() -> None:
    first, second = tries(
        (0, "submitted", {}),
        (5, "started", {"try": "0.0", "nodes": 2, "node_list": ["c1", "c2"]}),
        (10, "loaded", {}),
        (50, "restarting", {**FAULT, "in_place": "job"}),
        (52, "started", {"try": "0.0.1", "nodes": 1, "node_list": ["c1"]}),
        (60, "loaded", {}),
        (100, "failed", {"reason": "ValueError: loss is nan"}),
    )
    assert (first.outcome, first.ended, second.nodes) == ("restarted", at(50), 1)
    assert seconds(second) == {"queued": 0, "starting": 8, "running": 40, "lost": 40}
    assert second.outcome == "failed" and second.reason == "ValueError: loss is nan"


def test_a_try_without_a_last_word_ended_with_its_last_sign() -> None:
    first, second = tries(
        (0, "submitted", {}),
        (10, "started", {"try": "0.0", "nodes": 1, "node_list": ["c1"]}),
        (20, "loaded", {}),
        (40, "checkpoint", {"step": 5}),
        (150, "lost", {"message": "the try before this one left no last word", "saved": 5}),
        (151, "started", {"try": "0.1", "nodes": 1, "node_list": ["c1"]}),
    )
    assert (first.ended, first.outcome) == (at(40), "lost")
    assert second.queued == at(40)


def test_a_run_in_the_queue_has_waited_until_now() -> None:
    (one,) = tries((0, "submitted", {}), until=90, active=True)
    assert (one.number, one.active, seconds(one)["queued"]) == ("", True, 90)
    assert cost.of_tries([one], CLUSTER, Prices()).cpu_hours == 0


def test_a_run_under_way_costs_until_now() -> None:
    (one,) = tries(
        (0, "submitted", {}), (10, "started", {"try": "0.0", "nodes": 3}), (20, "loaded", {}), until=110, active=True
    )  # fmt: skip
    made = cost.of_tries([one], CLUSTER, Prices(gpu_hour=2.0))
    assert one.active and one.outcome == ""
    assert made.gpu_hours == pytest.approx(100 / 3600 * 3 * 2)
    assert made.money == pytest.approx(made.gpu_hours * 2.0)


def test_the_cost_of_the_story() -> None:
    made = cost.of_tries(tries(*STORY), CLUSTER, Prices(cpu_hour=0.05, gpu_hour=2.0))
    node_hours = (20 + 28 + 10 + 22) / 3600 * 2
    assert made.cpu_hours == pytest.approx(node_hours * 8)
    assert made.gpu_hours == pytest.approx(node_hours * 2)
    assert made.lost_gpu_hours == pytest.approx((8 + 10) / 3600 * 2 * 2)  # what was not saved, starting again
    assert made.lost_share == pytest.approx(18 / 80)
    assert made.money == pytest.approx(made.cpu_hours * 0.05 + made.gpu_hours * 2.0)
    both = cost.total([made, made], Prices(gpu_hour=1.0))
    assert both.gpu_hours == pytest.approx(2 * made.gpu_hours) and both.money == pytest.approx(both.gpu_hours)


@pytest.mark.parametrize("time", ["", "yesterday", None, 7])
def test_events_without_a_time_are_passed_over(time: object) -> None:
    assert timeline.read([{"event": "started", "time": time}, {}], [], at(9), active=False) == []
