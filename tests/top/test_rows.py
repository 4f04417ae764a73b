"""Lines as people see them: widths, words, and what others wrote."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from hpcdl.monitor import stragglers
from hpcdl.runs.store import RunDir
from hpcdl.top import details
from hpcdl.top.curve import MOST, Curve, sparkline
from hpcdl.top.frame import lines, once
from hpcdl.top.reading import Row
from hpcdl.top.rows import SORTS, bar, layout, ordered, plain, size
from hpcdl.top.warnings import Warnings
from hpcdl.top.watch import Wanted, Watch
from tests.runs.making import FakeJob, FakeSlurm, ago, make_run, make_submission
from tests.top.making import GIB, ended, log, running, sample, train

EVIL = "[red]x[/]\x1b[31m\x1b]0;title\x07\r\n\u202egnirts\x9b2J"
ACTING = set("\x1b\x07\r\n\x9b\u202e")


def rows(runs_dir: Path, fake: FakeSlurm) -> list[Row]:
    return list(once(Watch(Wanted(folder=runs_dir, everything=True), fake.slurm())).rows)


def frame(runs_dir: Path, fake: FakeSlurm, width: int, *queries: str) -> list[str]:
    wanted = Wanted(folder=runs_dir, queries=queries)
    return list(lines(once(Watch(wanted, fake.slurm())), wanted, width))


def test_a_curve_spans_the_whole_run_in_little_memory():
    curve = Curve()
    for step in range(100_000):
        curve.add(step, 5.0 - step / 50_000)
    points = curve.points()
    assert len(points) <= MOST + 1
    assert (points[0][0], points[-1][0]) == (0, 99_999)
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(points)]
    assert max(gaps) < 100_000 / MOST * 4


def test_a_curve_forgets_what_a_lost_try_did():
    curve = Curve()
    for step in (*range(10), *range(5, 8)):
        curve.add(step, float(step))
    assert [step for step, _ in curve.points()] == list(range(8))


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf"), 1e308])
def test_a_loss_that_is_none_draws_nothing_wrong(loss: float | None):
    curve = Curve()
    for step in range(20):
        curve.add(step, loss if step in (3, 4) else 1.0)
    assert len(sparkline(curve.points(), 8)) == 8


def test_sparklines():
    assert sparkline([(i, float(i)) for i in range(8)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([(0, 1.0), (1, 1.0)], 8) == "▁▁"
    assert (
        sparkline([(0, 2.0), (100, 1.0), (101, 1.0), (102, 1.0)], 4) == "█▇▇▁"[:1] + "██▁"
    )  # a gap holds its level
    assert sparkline([], 8) == ""


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 100, 120, 160, 300])
def test_lines_are_exactly_as_wide_as_the_terminal(runs_dir: Path, fake: FakeSlurm, width: int):
    train(running(runs_dir, "aaaaaaaaaaaa", name="日本語の名前"), range(1, 60))
    make_run(runs_dir, "bbbbbbbbbbbb", reason="x" * 500)
    ended(runs_dir, "cccccccccccc", "OUT_OF_MEMORY", reason="a reason")
    fitting = layout(width)
    made = [fitting.heading, *(fitting.line(row) for row in rows(runs_dir, fake))]
    used = cell_len(made[0].plain)
    assert {cell_len(line.plain) for line in made} == {used}
    assert used == width if 80 <= width <= 160 else used <= width


def test_80_columns_have_what_matters():
    assert [column.title for column, _ in layout(80).columns] == [
        *("", "run", "name", "state", "progress", "left", "loss", "curve", "tok/s", "mem")
    ]
    titles = [column.title for column, _ in layout(120).columns]
    assert {"cpu", "gpu", "nodes", "job"} <= set(titles)


def test_a_pending_run_says_when_it_starts_and_why_it_waits(runs_dir: Path, fake: FakeSlurm):
    make_submission(runs_dir, job_id="7")
    fake.jobs["7"] = [FakeJob("PENDING", tasks="0", reason="Resources", start=ago(-7190)[:19])]
    make_run(runs_dir, job_id="7_0")
    text = frame(runs_dir, fake, 100)[1]
    assert "starts ~" in text
    assert "(in 1h)" in text
    assert "Resources: waits for nodes to become free" in text
    assert "expected to start" not in text  # said once


def test_the_frame_for_scripts(runs_dir: Path, fake: FakeSlurm):
    run = running(runs_dir, "aaaaaaaaaaaa", kind="local", host="elsewhere", agent_pid=1, max_steps=200)
    train(run, range(1, 51))
    sample(run, gpus=2)
    run.event("leak", node="n1", process={"role": "rank"}, message="rank 1 on n1 leaks 3 MiB")
    head, line, warning, summary = frame(runs_dir, fake, 120)
    assert head.split()[:4] == ["run", "name", "state", "progress"]
    for word in ("aaaaaaaaaaaa", "tiny", "RUNNING", " 25%", "1:15", "2.360", "12.3k", "5.0G", "195%", "88%"):
        assert word in line
    assert warning == "! aaaaaaaaaaaa LEAK: rank 1 on n1 leaks 3 MiB"
    assert summary == "1 RUNNING"


def test_no_run_is_said(runs_dir: Path, fake: FakeSlurm):
    assert "no run yet in" in frame(runs_dir, fake, 80)[0]
    ended(runs_dir, "bbbbbbbbbbbb", seconds=9000)
    assert "1 run ended over an hour ago (hpcdl top --all shows them)" in frame(runs_dir, fake, 80)[0]


def evil(runs_dir: Path) -> RunDir:
    run = running(runs_dir, kind="local", host="elsewhere", agent_pid=1, reason=EVIL, node_list=(EVIL,))
    run.update(name=EVIL)
    train(run, range(1, 3))
    sample(run, "n1", gpus=1, time=EVIL)
    log(run, f"[rank 0] {EVIL}", EVIL)
    run.event("straggler", rank=EVIL, node=EVIL, cause=EVIL, why=EVIL)
    run.event("leak", node=EVIL, process={"role": EVIL}, memory=EVIL, message=EVIL)
    run.event(EVIL, reason=EVIL)
    return run


def test_what_others_wrote_does_not_act(runs_dir: Path, fake: FakeSlurm):
    run = evil(runs_dir)
    row = rows(runs_dir, fake)[0]
    more = details.Details(run)
    more.read(row.view)
    made = [
        layout(160).line(row),
        *details.pane(row, 80, 14),
        *details.rank_lines(row),
        *details.node_lines(row),
        *map(details.log_line, more.log),
        *map(details.event_line, more.events),
        *map(plain, frame(runs_dir, fake, 160)),
    ]
    assert sum("[red]x[/]" in line.plain for line in made) > 8  # shown as it is, and no markup
    for line in made:
        assert not ACTING & set(line.plain), repr(line.plain)


def test_numbers_of_any_size_are_shown(runs_dir: Path, fake: FakeSlurm):
    run = running(runs_dir, kind="local", host="elsewhere", agent_pid=1)
    sample(run, memory_limit_bytes=10**400, pss_bytes=10**400, cpu_percent=10**400)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 5, "loss": NaN, "tokens_per_s": 1e400, "step_s": -1e300}\n')
    row = rows(runs_dir, fake)[0]
    assert "nan" in layout(160).line(row).plain
    assert details.pane(row, 80, 14)
    assert details.node_lines(row)


VALUES = (
    None,
    True,
    -1,
    0,
    3,
    1e308,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "x",
    "2026-01-01",
    "0001-01-01T00:00:00+14:00",
    [],
    [1],
    {},
    {"a": 1},
)
KEYS = (
    *(
        "time",
        "event",
        "step",
        "loss",
        "tokens_per_s",
        "step_s",
        "peak_memory_bytes",
        "rank",
        "node",
        "nodes",
    ),
    *(
        "work",
        "process",
        "memory",
        "slower_by",
        "ranks",
        "cause",
        "why",
        "since_step",
        "message",
        "reason",
        "try",
    ),
    *("wait_s", "data_s", "cpu_s", "delay_s", "still_s", "pid", "role", "index", "rss_bytes", "pss_bytes"),
    *("memory_limit_bytes", "memory_available_bytes", "cpu_percent", "throttled", "attempt", "node_list"),
)


def anything(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """A record of hpcdl's keys with any values."""
    record = {key: draw.choice(VALUES) for key in draw.sample(KEYS, draw.randint(0, 30))}
    record["event"] = draw.choice(
        ("leak", "straggler", "hang", "started", "checkpoint", "warning", *VALUES[:3])
    )
    if depth == 0:
        lists = {key: [draw.choice(VALUES) for _ in range(draw.randint(0, 3))] for key in KEYS}
        record |= {
            "processes": lists,
            "gpus": lists,
            "process": anything(draw, 1),
            "growing": [anything(draw, 1)],
        }
        record |= {key: lists[key] for key in draw.sample(KEYS, 3)}
    return record


@pytest.mark.parametrize("seed", range(60))
def test_files_that_hold_anything_are_drawn_or_said(runs_dir: Path, fake: FakeSlurm, seed: int):
    draw = random.Random(seed)
    run = running(runs_dir, kind="local", host="elsewhere", agent_pid=1)
    for name in ("metrics.jsonl", "events.jsonl", "system-n1.jsonl", "ranks.jsonl"):
        (run.path / name).write_text("".join(json.dumps(anything(draw)) + "\n" for _ in range(6)))
    row = rows(runs_dir, fake)[0]
    more = details.Details(run)
    more.read(row.view)
    for width in (80, 160):
        assert layout(width).line(row).plain
        assert len(details.pane(row, width, 14)) <= 14
    details.rank_lines(row, more.times)
    details.node_lines(row)
    assert len([details.event_line(line) for line in more.events]) == 6
    for sort in SORTS:
        ordered([row, row], sort, "x")


def test_ranks_and_nodes(runs_dir: Path, fake: FakeSlurm):
    run = running(runs_dir, nodes=2, world_size=4)
    sample(run, "n1", range(2), gpus=2, time=ago(9))
    sample(run, "n2", range(2, 4), gpus=2)
    sample(run, "n1", range(2), gpus=2, net_sent_bytes=10_000_000 + 7 * (5 << 20))
    row = rows(runs_dir, fake)[0]
    times = [
        stragglers.Row(rank=r, node="n1", times=stragglers.Times(step_s=0.5, wait_s=0.1 * r))
        for r in range(4)
    ]
    heading, *ranks = [line.plain for line in details.rank_lines(row, times)]
    assert " ".join(heading.split()) == "rank node step phase rss pss cpu thr gpu mem own wait loaders"
    assert [line.split()[0] for line in ranks] == ["0", "1", "2", "3"]
    assert ranks[3].split() == [
        "3",
        "n2",
        "40",
        "step",
        "3.0G",
        "2.0G",
        "98%",
        "12",
        "61.0G",
        "200ms",
        "300ms",
        "60%",
        "-",
    ]
    assert ranks[0].rstrip().endswith("1: 512M")
    text = "\n".join(line.plain for line in details.node_lines(row))
    assert "5M/s" in text
    assert "throttled: sw_power_cap" in text
    assert "412W" in text


def test_a_column_without_values_is_left_out(runs_dir: Path, fake: FakeSlurm):
    sample(running(runs_dir))
    heading = details.rank_lines(rows(runs_dir, fake)[0])[0].plain
    assert "gpu mem" not in heading
    assert "wait" not in heading


def test_warnings_go_with_their_try_and_their_end():
    warnings = Warnings()
    slow = {"event": "straggler", "rank": 3, "node": "n1", "since_step": 40, "why": "0.2 s a step"}
    leak = {"event": "leak", "node": "n1", "process": {"role": "rank", "rank": 1, "pid": 2}, "memory": "gpu"}
    warnings.take({**slow, "slower_by": 1.5, "cause": "computing"})
    warnings.take({**leak, "message": "leaks 2 MiB"})
    warnings.take({**leak, "message": "leaks 3 MiB"})
    warnings.take({**slow, "slower_by": 2.0, "cause": "its node"})
    assert [w.text for w in warnings.all()] == [
        "leaks 3 MiB",
        "rank 3, node n1: 2.00 times the others' own time since step 40: its node (0.2 s a step)",
    ]
    warnings.take({"event": "straggler_over", "rank": 3})
    assert [w.kind for w in warnings.all()] == ["leak"]
    warnings.take({"event": "checkpoint_failed", "message": "no space"})
    assert [w.text for w in warnings.all()][-1] == "no space"
    warnings.take({"event": "checkpoint", "step": 5})
    assert [w.kind for w in warnings.all()] == ["leak"]
    warnings.take({"event": "started"})
    assert warnings.all() == ()


@pytest.mark.parametrize("sort", SORTS)
def test_every_way_of_sorting_takes_runs_without_measurements(runs_dir: Path, fake: FakeSlurm, sort: str):
    full, nan = running(runs_dir, "aaaaaaaaaaaa"), running(runs_dir, "bbbbbbbbbbbb")
    train(full, range(1, 9))
    sample(full, gpus=1)
    nan.metrics_file.write_text('{"step": 1, "loss": NaN, "tokens_per_s": NaN, "step_s": NaN}\n')
    make_run(runs_dir, "cccccccccccc")
    ended(runs_dir, "dddddddddddd", "FAILED")
    found = [row.state.run_id[0] for row in ordered(rows(runs_dir, fake), sort)]
    assert sorted(found) == ["a", "b", "c", "d"]
    if sort in ("loss", "tok/s", "memory", "cpu", "gpu", "progress"):
        assert found[0] == "a"


@pytest.mark.parametrize(
    ("pattern", "found"), [("TINY", 3), ("pending", 1), ("bbbb", 1), ("n17", 1), ("leak", 1), ("nothing", 0)]
)
def test_the_filter(runs_dir: Path, fake: FakeSlurm, pattern: str, found: int):
    running(runs_dir, "aaaaaaaaaaaa", node_list=("n17",), kind="local", host="elsewhere", agent_pid=1)
    make_run(runs_dir, "bbbbbbbbbbbb", job_id="7_0")
    ended(runs_dir, "cccccccccccc").event("leak", node="n2")
    made = ordered(list(Watch(Wanted(folder=runs_dir), fake.slurm()).refresh().rows), "state", pattern)
    assert len(made) == found


def test_logs_go_on_over_a_requeue_and_leave_earlier_tries_out(runs_dir: Path, fake: FakeSlurm):
    run = running(runs_dir)
    log(run, "[rank 0] of an earlier try", attempt="0.0")
    log(run, "[rank 0] first", node="n1", attempt="1.0")
    log(run, "[rank 1] second", node="n2", attempt="1.0")
    row = rows(runs_dir, fake)[0]
    more = details.Details(run)
    more.read(row.view)
    assert [line.split("] ")[1] for line in more.log] == ["first", "second"]
    log(run, "[rank 0] third", node="n0", attempt="1.1")
    more.read(row.view)
    more.read(row.view)
    assert [line.split("] ")[1] for line in more.log] == ["first", "second", "third"]


def test_a_job_without_a_log_shows_its_own_output(runs_dir: Path, fake: FakeSlurm):
    run = make_run(runs_dir, job_id="7_0")
    more = details.Details(run)
    row = rows(runs_dir, fake)[0]
    more.read(row.view)
    assert more.note == "no log yet"
    (make_submission(runs_dir, job_id="7") / "slurm-7_0.out").write_text("srun: error: no such partition\n")
    more.read(row.view)
    assert list(more.log) == ["srun: error: no such partition"]
    assert "slurm-7_0.out" in more.note


def test_small_things():
    assert (bar(0.5, 4), bar(7.0, 4), bar(-1.0, 2)) == ("━━──", "━━━━", "──")
    assert [size(n) for n in (None, 0, 512 << 20, 5 * GIB, 1000 * GIB, 5000 * GIB)] == [
        *("", "0B", "512M", "5.0G", "1000G", "4.9T")
    ]
