"""Curves thinned out, axes with round ticks, plots as paths."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest

from hpcdl.report import plots, scale, series
from hpcdl.report.plots import Axis, Line, Plot


def test_a_spike_of_one_step_is_seen_among_a_hundred_thousand() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    points[33_333] = (33_333.0, -9.0)
    thin = series.thin(points, 500)
    assert len(thin) <= 500
    assert {(77_777.0, 9.0), (33_333.0, -9.0), points[0], points[-1]} <= set(thin)
    assert thin == sorted(thin)


def test_a_few_lines_of_a_long_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as out:
        for step in range(1, 20_001):
            out.write(json.dumps({"step": step, "loss": 1.0 / step}) + "\n")
        out.write('{"step": 20001, "lo')  # its writer was killed
    assert file.stat().st_size > series.WHOLE_BYTES
    steps = [line["step"] for line in series.sampled(file, 40)]
    assert 35 <= len(steps) <= 41 and steps == sorted(set(steps))
    assert steps[0] == 1 and steps[-1] == 20_000
    assert max(b - a for a, b in itertools.pairwise(steps)) < 1000
    assert series.sampled(tmp_path / "none.jsonl", 40) == []


def test_quantiles_of_many_curves() -> None:
    curves = [[(float(x), float(height)) for x in range(100)] for height in range(101)]
    low, middle, high = series.quantiles(curves, (0.05, 0.5, 0.95), most=10)
    assert (
        {y for _, y in low} == {5.0} and {y for _, y in middle} == {50.0} and {y for _, y in high} == {95.0}
    )
    assert len(middle) == 10
    assert series.quantiles([], (0.5,)) == [[]]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"), (12_500, "", "12.5k"), (3_000_000, "", "3M"), (0.25, "", "0.25"), (3e-4, "", "0.0003"),
        (3e-6, "", "3e-6"), (999.96, "", "1000"), (-1500, "", "-1.5k"), (1536 * 2**20, scale.BYTES, "1.5 GiB"),
        (512, scale.BYTES, "512 B"), (0.15, scale.SECONDS, "150 ms"), (150, scale.SECONDS, "2m 30s"),
        (7200, scale.SECONDS, "2h"), (90061, scale.SECONDS, "1d 1h"), (50, "%", "50 %"), (12_000, "step", "12,000"),
    ],
)  # fmt: skip
def test_values_as_they_are_written(value: float, unit: str, text: str) -> None:
    assert scale.written(value, unit) == text


@pytest.mark.parametrize("unit", ["", "step", scale.BYTES, scale.SECONDS, "%"])
@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3, 3), (0, 0), (-2, 5), (1e-9, 2e-9), (7, 7e12), (120, 100_000), (-5, -5)]
)
def test_ticks_are_few_differ_and_lie_on_the_axis(low: float, high: float, unit: str) -> None:
    for log in (False, True):
        for axis in (scale.over(low, high, unit, log=log), scale.along(low, high, unit, log=log)):
            assert axis.low < axis.high
            assert axis.low <= low + abs(low) * 1e-9 and high <= axis.high + abs(high) * 1e-9
            assert len(axis.ticks) <= 8
            assert all(0 <= axis.share(tick) <= 1 for tick in axis.ticks)


def test_a_few_values_have_a_tick_each_and_room_beside_them() -> None:
    axis = scale.between([1, 2, 4, 8], log=True)
    assert axis.ticks == (1, 2, 4, 8) and 0 < axis.share(1) < axis.share(8) < 1
    assert scale.between([1, 1.01, 9]).ticks == (1, 9)  # two ticks would stand in each other's way
    alone = scale.between([5])
    assert alone.ticks == (5,) and alone.share(5) == pytest.approx(0.5)


def drawn(*lines: Line, **more: object) -> dict[str, object]:
    made = plots.draw(Plot(title="t", x=Axis(label="x"), y=Axis(label="y"), lines=lines, **more))  # type: ignore[arg-type]
    assert made is not None
    return made


def test_a_plot_is_a_path_in_its_square() -> None:
    made = drawn(Line(label="a", points=[(0, 0), (5, 10), (10, 5)]))
    (path,) = made["paths"]  # type: ignore[misc]
    assert path["d"] == "M0 1000 500 0 1000 500"
    assert "0 to 5, lowest 0, highest 10" in str(made["alt"])


def test_a_page_of_many_points_stays_small() -> None:
    points = [(float(x), math.sin(x / 100)) for x in range(1_000_000)]
    (path,) = drawn(Line(label="a", points=points))["paths"]  # type: ignore[misc]
    assert len(path["d"]) < 10_000


def test_many_curves_are_a_band_and_the_highest() -> None:
    curves = [(f"rank {r}", [(float(x), float(r)) for x in range(50)]) for r in range(64)]
    band, middle, top = plots.many(curves, "ranks")
    assert (band.style, band.label, middle.label, top.label) == (
        "band",
        "all 64 ranks",
        "median",
        "highest: rank 63",
    )
    assert len(plots.many(curves[:6], "ranks")) == 6
    assert re.match(r"M[\d. ]+L.*Z$", drawn(band)["paths"][0]["d"])  # type: ignore[index]


def test_a_level_far_above_does_not_press_the_lines_flat() -> None:
    line = Line(label="a", points=[(0, 1), (1, 2)])
    assert len(drawn(line, levels=[(3.0, "near")])["levels"]) == 1  # type: ignore[arg-type]
    assert drawn(line, levels=[(100.0, "far")])["levels"] == []


def test_nothing_to_draw_is_no_plot() -> None:
    assert (
        plots.draw(Plot(title="t", x=Axis(label="x"), y=Axis(label="y"), lines=[Line(label="a", points=[])]))
        is None
    )


def test_one_point_is_a_dot() -> None:
    (path,) = drawn(Line(label="a", points=[(3, 4)]))["paths"]  # type: ignore[misc]
    assert path["style"] == "dots"
