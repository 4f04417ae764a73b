"""What is under way in a pipeline, by schedule."""

from __future__ import annotations

import pytest

from hpcdl.distributed import stages as layout
from hpcdl.plan.crowd import Crowd, crowds
from hpcdl.plan.schedules import order


@pytest.mark.parametrize("schedule", layout.SCHEDULES)
def test_each_micro_batch_goes_forward_and_back_once_through_each_stage(schedule: str) -> None:
    each = layout.SCHEDULES[schedule].stages_per_rank
    for rank in range(4):
        ops = order(schedule, 4, rank, each, 12)
        for place in range(each):
            for number in range(12):
                kinds = [op.kind for op in ops if (op.place, op.number) == (place, number)]
                assert kinds in (["F", "B"], ["F", "I", "W"])


def highest(found: tuple[Crowd, ...]) -> float:
    return max(crowd.under_way for crowd in found)


def test_one_forward_one_back_keeps_as_many_as_there_are_ranks_to_the_end() -> None:
    assert [highest(crowds("1f1b", 4, rank, (2,), 16, rounds=False)) for rank in range(4)] == [4, 3, 2, 1]


def test_gpipe_keeps_all_and_their_losses_but_no_gradients_yet() -> None:
    found = crowds("gpipe", 2, 1, (2,), 8, rounds=False)
    assert Crowd(True, 8.0, 7, 0.0, 0.0, False, True) in found  # the first way back
    assert Crowd(True, 7.0, 6, 0.0, 1.0, True, True) in found  # the second, beside the first's gradients
    assert not any(crowd.under_way == 8 and crowd.there for crowd in found)


def test_gradients_of_an_earlier_round_are_there_from_the_beginning() -> None:
    assert all(crowd.own for crowd in crowds("gpipe", 2, 0, (2,), 4, rounds=True))


def test_stages_of_unlike_sizes_count_as_they_are() -> None:
    """Of a rank with three blocks and one, three micro-batches in the large one are 2.25 of all."""
    found = crowds("interleaved_1f1b", 2, 1, (3, 1), 4, rounds=False)
    assert highest(found) == pytest.approx(3 * 3 / 4)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "interleaved_zb", "zbv", "dualpipev"])
def test_more_micro_batches_than_show_the_rhythm_change_nothing(schedule: str) -> None:
    each = layout.SCHEDULES[schedule].stages_per_rank
    for rank in range(4):
        many = crowds(schedule, 4, rank, (2,) * each, 512, rounds=False)
        every = crowds(schedule, 4, rank, (2,) * each, 32, rounds=False)
        assert {one[:-1] for one in many} == {one[:-1] for one in every}
