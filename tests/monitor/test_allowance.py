"""How many bytes of samples a day, whatever a line takes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hpcdl.monitor import allowance
from hpcdl.monitor.allowance import FIRST_BYTES, Allowance

DAY = 86400.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def spent_in(days: float, line: int, every_s: float, per_day: float = 10e6) -> tuple[int, int]:
    """Bytes and lines of a run that samples whenever it may."""
    clock = Clock()
    room, size, lines = Allowance(per_day, clock=clock), 0, 0
    while clock.now < days * DAY:
        room.spend(line)
        size, lines = size + line, lines + 1
        clock.now += max(every_s, room.pause_s(line))
    return size, lines


@pytest.mark.parametrize(("line", "every_s"), [(300, 5.0), (2500, 5.0), (2500, 1.0), (60_000, 5.0)])
def test_a_day_costs_what_it_may_cost(line: int, every_s: float) -> None:
    size, lines = spent_in(7.0, line, every_s)
    assert size <= FIRST_BYTES + 7 * 10e6 + line
    # And no less: samples are as dense as they may be.
    assert lines == 7 * DAY / every_s or size > 0.98 * 7 * 10e6


def test_a_run_begins_dense_and_keeps_something_for_moments_that_matter() -> None:
    clock = Clock()
    room = Allowance(10e6, clock=clock)
    count = 0
    while room.pause_s(2500) == 0.0:
        room.spend(2500)
        count += 1
    assert count == 300
    assert room.pause_s(2500) == pytest.approx(21.6)
    urgent = 0
    while room.has_room_for(2500):
        room.spend(2500)
        urgent += 1
    assert urgent == 99
    clock.now = 2 * DAY
    assert room.pause_s(2500) == 0.0, "a quiet time is saved up, once"


@pytest.mark.parametrize(
    ("age_days", "size", "left"),
    [
        (0.0, 100, FIRST_BYTES - 100), (1.0, 10_500_000, 500_000), (1.0, 5_000_000, FIRST_BYTES),
        (0.1, 5_000_000, 50_000),
    ],
)  # fmt: skip
def test_a_later_try_goes_on_with_what_the_file_has_taken(
    tmp_path: Path, age_days: float, size: int, left: int
) -> None:
    file = tmp_path / "system-n1.jsonl"
    began = datetime.now(UTC) - timedelta(days=age_days)
    line = json.dumps({"time": began.isoformat()}) + "\n"
    file.write_text(line + "x" * (size - len(line)))
    room = allowance.for_file(file, 10e6)
    assert room.has_room_for(left - 2000) and not room.has_room_for(left + 2000)


@pytest.mark.parametrize(
    "text", [None, "", "{torn", "[1]\n", '{"time": "never"}\n', '{"time": "2026-01-31"}\n']
)
def test_a_file_that_begins_in_some_other_way(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "file").write_text(text)
    assert allowance.for_file(tmp_path / "file", 10e6).has_room_for(FIRST_BYTES - 1)
