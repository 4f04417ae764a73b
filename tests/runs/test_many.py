from __future__ import annotations

import threading
import time

from hpcdl.runs import many


def test_quick_items_are_taken_in_turn() -> None:
    threads = set()

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        return item * item

    assert list(many.each(work, range(200))) == [n * n for n in range(200)]
    assert list(many.each(work, [])) == []
    assert threads == {threading.get_ident()}


def test_items_that_wait_for_a_disk_wait_together_and_keep_their_order() -> None:
    meet = threading.Barrier(4, timeout=60)
    begun = threading.Event()

    def work(item: int) -> int:
        if item < many.PROBE:
            time.sleep(0.001)  # what a slow disk takes
        elif item % many.PROBE == 0 and item <= 4 * many.PROBE:
            meet.wait()  # four batches are under way at the same time, or this fails
            begun.set()
        return item

    assert list(many.each(work, range(300))) == list(range(300))
    assert begun.is_set()


def test_a_fault_reaches_the_caller() -> None:
    def work(item: int) -> int:
        time.sleep(0.001)
        if item == 70:
            raise ValueError("seventy")
        return item

    try:
        list(many.each(work, range(100)))
    except ValueError as error:
        assert str(error) == "seventy"
    else:
        raise AssertionError("no fault")
