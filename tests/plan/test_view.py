from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hpcdl.errors import UsageError
from hpcdl.plan import bar, limits, make, memory, view
from hpcdl.plan.records import Plan
from tests.factory import tiny_spec
from tests.plan.making import GIB, hardware, plan, rank


@pytest.mark.parametrize(
    ("memory_gib", "expected"),
    [(24.0, "fits"), (21.0, "fits"), (20.0, "close"), (19.0, "too big"), (None, "unknown")],
)
def test_what_is_a_little_too_big_is_neither_refused_nor_called_fitting(
    memory_gib: float | None, expected: str
) -> None:
    assert limits.verdict(plan(hardware=hardware(memory_gib))) == expected


def test_what_malloc_may_keep_refuses_nothing_by_itself() -> None:
    cpu = hardware(19.0)
    cpu = replace(cpu, device=replace(cpu.device, kind="cpu"))
    holes = replace(rank(share=0.5), allocator=16 * GIB)  # 10.5 GiB and 16
    assert limits.verdict(plan(memory=(holes,), hardware=cpu)) == "close"
    assert limits.verdict(plan(memory=(holes,), hardware=hardware(19.0))) == "too big"
    more = replace(holes, allocator=18 * GIB)
    assert limits.verdict(plan(memory=(more,), hardware=cpu)) == "too big"


def test_a_plan_without_memory_claims_nothing() -> None:
    unknown = plan(memory=None, unknown=("memory: nobody knows",))
    assert limits.verdict(unknown) == "unknown"
    assert "not known" in limits.fits_in_words(unknown)
    assert limits.line(unknown).startswith("memory unknown, step 2 s")


def test_one_line_says_all() -> None:
    assert limits.line(plan(), "at once") == (
        "21.0 GiB of 24.0 GiB a process (fits), step 2 s, 100 steps in about 4 min 10 s, starts at once"
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (3.21, "3.2 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3599.6, "1 h"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert limits.duration(seconds) == expected


def shown(made: Plan, width: int = 80) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width)
    view.show(console, view.Shown(spec=tiny_spec(), plan=made, start="at once"))
    return text.getvalue()


def test_a_plan_to_read_without_colours_at_80_columns() -> None:
    text = shown(plan())
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "fits: 21.0 GiB of 24.0 GiB a process, 3.0 GiB to spare" in text
    assert re.search(r"^optimizer +8\.0 GiB +8\.0 GiB$", text, re.M)
    assert re.search(r"^activations +3\.0 GiB +6\.0 GiB$", text, re.M)
    assert "in the backward pass" in text
    assert "2 s, 8,192 tokens/s, MFU 38.0 %" in text
    assert "all-reduce of gradients (dp_replicate)" in text
    assert "0.556 GPU-hours" in text
    assert "3 at once: 270.0 GiB" in text
    drawn = next(line for line in text.splitlines() if line.startswith("WWW"))
    shares = {letter: drawn.count(letter) for letter in "WGOal.|"}
    assert shares["O"] == pytest.approx(2 * shares["W"], abs=1)
    assert shares["."] == pytest.approx(79 * 3 / 24, abs=1)
    assert shares["|"] == 1
    assert drawn.endswith("|")


def test_stages_that_hold_the_same_stand_together_and_the_limit_is_marked() -> None:
    stages = (rank(0), rank(1, share=0.9), rank(2, share=0.9), rank(3, share=0.5))
    text = shown(plan(memory=stages, hardware=hardware(19.0)))
    assert "doesn't fit: 21.0 GiB of 19.0 GiB a process, 2.0 GiB too much" in text
    drawn = {line.split("  ")[0]: line for line in text.splitlines() if "WW" in line}
    assert list(drawn) == ["stage 0", "stages 1-2", "stage 3"]
    assert not drawn["stage 0"].rstrip().endswith("|")
    assert drawn["stage 3"].index("|") == drawn["stage 0"].index("|")


def test_many_stages_show_the_first_the_fullest_and_the_last() -> None:
    stages = tuple(rank(i, share=1 - i / 40 + (i == 9) / 3) for i in range(16))
    text = shown(plan(memory=stages, hardware=hardware(80.0)))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "stage 9" in text
    assert "stage 15" in text
    assert "10 more stages" in text


def test_a_plan_for_scripts_is_whole_and_json() -> None:
    made = json.loads(json.dumps(view.as_json(view.Shown(spec=tiny_spec(), plan=plan()))))
    assert (made["fits"], made["verdict"]) == (True, "fits")
    assert made["peak_bytes"] == 21 * GIB == made["stages"][0]["peak"]
    assert made["time"]["step_s"] == pytest.approx(2.0)
    assert made["disk_bytes"] == 270 * GIB
    assert made["hardware"]["sources"]["memory"] == "cluster.gpu_mem_gb"


def test_points_stand_as_they_were_given() -> None:
    points = [
        ("b=2", plan()),
        ("a=1", plan(hardware=hardware(19.0))),
        ("c=3", plan(memory=None, unknown=("why",))),
    ]
    text = io.StringIO()
    rows = [view.Shown(spec=tiny_spec(), plan=each, label=label) for label, each in points]
    view.show_many(Console(file=text, width=80), rows)
    lines = text.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["b=2", "a=1", "c=3"]
    assert ["yes" in lines[1], "no" in lines[2], "?" in lines[3]] == [True] * 3
    assert "unknown: why" in lines


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    made = view.Shown(spec=tiny_spec(), plan=plan(memory=(rank(0), rank(1, share=0.5))))
    bar.draw(*view.picture([made]), file)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="a picture ends in"):
        bar.check_name(tmp_path / "plan.txt")
    with pytest.raises(UsageError, match="nothing to draw"):
        bar.draw(*view.picture([replace(made, plan=plan(memory=None))]), file)


def test_a_whole_plan_has_memory_time_and_disk() -> None:
    made = make.plan(tiny_spec(trainer__checkpoint_every=2, trainer__keep_last=1), hardware(name="a100"))
    assert made.unknown == ()
    assert made.peak is not None
    assert made.time is not None
    assert made.checkpoints == 2
    assert made.run_s is not None
    assert made.run_s > made.max_steps * made.time.step_s


def test_what_is_unknown_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ranks", lambda *_: None)
    made = make.plan(tiny_spec(), hardware())
    assert made.memory is None
    assert made.fits is None
    assert any(line.startswith("memory: ") for line in made.unknown)


def test_the_smallest_run_that_there_may_be_must_fit() -> None:
    spec = tiny_spec(
        cluster__kind="slurm", cluster__nodes=4, cluster__min_nodes=2, cluster__processes_per_node=2
    )
    assert make.smallest_world(spec) == 4
