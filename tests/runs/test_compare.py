"""`hpcdl compare`: what differs, what is measured, against what a run scales, and how it is shown."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpcdl.errors import UsageError
from hpcdl.runs import compare, compare_plot, compare_row, compare_text, compare_view
from hpcdl.runs.compare import Comparison, collect
from hpcdl.runs.compare_groups import Asked, Study, judge
from hpcdl.runs.compare_row import speed
from hpcdl.runs.files import append_line, write_json
from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import dump_yaml, to_plain
from hpcdl.verbs import compare as compare_verb
from tests.factory import tiny_spec
from tests.runs.making import make_run

MIB = 1 << 20


def point(
    runs_dir: Path,
    number: int,
    *,
    tokens_per_s: float = 1000.0,
    state: str = "COMPLETED",
    steps: int = 4,
    memory: int = 300 * MIB,
    reason: str = "",
    extra: dict[str, Any] | None = None,
    **dotted: Any,
) -> RunDir:
    """A run of the tiny experiment with these keys, which has gone so many steps at this speed."""
    spec = tiny_spec(**{"cluster__kind": "slurm", **dotted})
    run = make_run(
        runs_dir,
        f"{number:04x}{'0' * 8}"[:12],
        state=state,
        reason=reason,
        kind="local",
        submission=None,
        nodes=spec.cluster.nodes,
        world_size=spec.cluster.world_size,
        max_steps=4,
    )
    run.spec_file.write_text(dump_yaml(to_plain(spec)))
    for step in range(1, steps + 1):
        warm = step > 1
        append_line(
            run.metrics_file,
            {
                "step": step,
                "loss": 5.0 - step / 4,
                "tokens_per_s": tokens_per_s if warm else 1.0,
                "step_s": 256 / tokens_per_s if warm else 256.0,
                "peak_memory_bytes": memory + step,
            },
        )
    if extra:
        append_line(run.metrics_file, {"step": 2, **extra})
    if steps:
        append_line(run.metrics_file, {"step": steps, "eval_loss": 4.5, "eval_perplexity": 90.0})
    return run


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def look(runs_dir: Path, *names: str, sort: str = "tokens_per_s") -> Comparison:
    return collect(names or ("tiny",), runs_dir, sort)


def judged(comparison: Comparison, **asked: Any) -> Study:
    return judge(comparison.rows, Asked(**asked))


def shown(comparison: Comparison, width: int = 160, **asked: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    compare_view.print_comparison(console, comparison, judged(comparison, **{"each": True, **asked}))
    return out.getvalue()


# --- what is measured


def test_the_first_step_is_left_out_and_the_rest_is_a_mean() -> None:
    lines = [
        {"step": 1, "step_s": 9.0, "tokens_per_s": 10.0},
        {"step": 2, "step_s": 1.0, "tokens_per_s": 100.0},
        {"step": 3, "step_s": 3.0, "tokens_per_s": 100.0 / 3},  # the step in which all meet
    ]
    assert speed(lines) == (pytest.approx(50.0), pytest.approx(2.0))
    # A line is the average of all steps since the line before it.
    every_tenth = [
        {"step": 10, "step_s": 9.0, "tokens_per_s": 1.0},
        {"step": 20, "step_s": 1.0, "tokens_per_s": 80.0},
        {"step": 25, "step_s": 4.0, "tokens_per_s": 20.0},
    ]
    assert speed(every_tenth) == (pytest.approx((800 + 400) / 30), pytest.approx(2.0))
    assert speed(lines[:1]) == (pytest.approx(10.0), pytest.approx(9.0))
    assert speed([]) == (None, None)
    assert speed([{"step": 1, "loss": 2.0}]) == (None, None)


def test_a_row_says_what_a_run_has_measured(runs_dir: Path) -> None:
    extra = {"comm_s": 0.02, "comm_bytes": 4 * MIB, "comm_share": 0.1}
    point(runs_dir, 1, cluster__nodes=2, cluster__processes_per_node=2, extra=extra)
    (row,) = look(runs_dir).rows
    assert (row.strategy, row.nodes, row.processes_per_node, row.processes) == ("ddp", 2, 2, 4)
    assert row.degrees == {"dp_replicate": 4}
    assert (row.tokens_per_s, row.step_s) == (pytest.approx(1000.0), pytest.approx(0.256))
    assert row.peak_memory_bytes == 300 * MIB + 4
    assert (row.comm_s, row.comm_bytes, row.comm_share) == pytest.approx((0.02, 4 * MIB, 0.1))
    assert (row.loss, row.eval_loss, row.step) == (4.0, 4.5, 4)


def test_the_results_cost_of_communication_goes_before_the_steps(runs_dir: Path) -> None:
    run = point(runs_dir, 1, extra={"comm_share": 0.1})
    write_json(run.result_file, {"comm_share": 0.3, "comm_bytes": 7})
    (row,) = look(runs_dir).rows
    assert (row.comm_share, row.comm_bytes, row.comm_s) == (0.3, 7, None)


def test_a_run_that_goes_on_is_taken_as_far_as_it_has_come(runs_dir: Path) -> None:
    run = point(runs_dir, 1, state="RUNNING", steps=2)
    import os

    from hpcdl.runs.processes import create_time

    run.update(host=os.uname().nodename, agent_pid=os.getpid(), agent_started=create_time(os.getpid()))
    comparison = look(runs_dir)
    assert (comparison.rows[0].state, comparison.rows[0].step) == ("RUNNING", 2)
    assert comparison.rows[0].tokens_per_s == pytest.approx(1000.0)
    assert "RUNNING 2/4" in shown(comparison)


def test_a_run_that_has_measured_nothing_has_dashes(runs_dir: Path) -> None:
    point(runs_dir, 1, state="FAILED", steps=0, reason="ValueError: nan")
    text = shown(look(runs_dir))
    assert "FAILED" in text and "ValueError: nan" in text
    row = look(runs_dir).rows[0]
    assert row.tokens_per_s is None and row.loss is None and row.peak_memory_bytes is None


def test_a_run_without_a_readable_spec_is_still_shown(runs_dir: Path) -> None:
    point(runs_dir, 1)
    point(runs_dir, 2).spec_file.write_text("[")
    assert {row.strategy for row in look(runs_dir).rows} == {"ddp", "?"}


# --- what differs


def test_what_differs(runs_dir: Path) -> None:
    point(runs_dir, 1, optim__lr=0.1, seed=1, cluster__time_min=5, tracker__name="wandb")
    point(runs_dir, 2, optim__lr=0.2, seed=1, cluster__time_min=9, cluster__nodes=2)
    comparison = look(runs_dir)
    assert comparison.differs == ("optim.lr",), "neither what changes no result, nor what has its own column"
    assert [dict(row.config) for row in comparison.rows] == [{"optim.lr": 0.1}, {"optim.lr": 0.2}]
    assert "lr" in shown(comparison).splitlines()[0]


@pytest.mark.parametrize(
    ("flat", "differs"),
    [
        ([{"parallel.name": "a", "parallel.tp": 1}, {"parallel.name": "b", "parallel.tp": 2}], ()),
        ([{"parallel.name": "a", "parallel.every": 1}, {"parallel.name": "b"}], ()),
        (
            [
                {"parallel.name": "a", "parallel.every": 1},
                {"parallel.name": "a", "parallel.every": 2},
                {"parallel.name": "b"},
            ],
            ("parallel.every",),
        ),
        (
            [{"model.name": "a", "model.shape.width": 1}, {"model.name": "b", "model.shape.width": 2}],
            ("model.name",),
        ),
        (
            [{"model.name": "a", "model.shape.width": 1}, {"model.name": "a", "model.shape.width": 2}],
            ("model.shape.width",),
        ),
        (
            [
                {"parallel.name": "a", "trainer.micro_batch_size": 1},
                {"parallel.name": "b", "trainer.micro_batch_size": 2},
            ],
            ("trainer.micro_batch_size",),
        ),
        ([{"seed": 1}, {}], ("seed",)),
        ([{"betas": [1, 2]}, {"betas": [1, 2]}], ()),
    ],
)
def test_what_follows_from_another_choice_is_no_difference(
    flat: list[dict[str, Any]], differs: tuple[str, ...]
) -> None:
    assert compare.differing(flat) == differs


@pytest.mark.parametrize(
    ("parallel", "world", "degrees"),
    [
        ({"dp_replicate": -1, "dp_shard": 1, "tp": 2}, 8, {"dp_replicate": 4, "tp": 2}),
        (
            {"dp_replicate": 2, "dp_shard": 2, "cp": 1, "tp": 1, "pp": 1},
            4,
            {"dp_replicate": 2, "dp_shard": 2},
        ),
        ({"dp_replicate": -1, "tp": 1}, 1, {}),
        ({}, 4, {}),
    ],
)
def test_degrees_are_filled(parallel: dict[str, int], world: int, degrees: dict[str, int]) -> None:
    assert compare_row.filled(parallel, world) == degrees


# --- scaling


def test_efficiency_is_against_the_smallest_world_of_the_same_strategy_and_config(runs_dir: Path) -> None:
    point(runs_dir, 1, tokens_per_s=1000)
    point(runs_dir, 2, tokens_per_s=1800, cluster__processes_per_node=2)
    point(runs_dir, 3, tokens_per_s=2000, cluster__processes_per_node=2, cluster__nodes=2)
    point(runs_dir, 4, tokens_per_s=500, cluster__processes_per_node=2, optim__lr=0.5)
    rows = {row.run_id[:4]: row for row in look(runs_dir).rows}
    assert [rows[f"{i:04x}"].efficiency for i in (1, 2, 3)] == pytest.approx([1.0, 0.9, 0.5])
    assert {rows[f"{i:04x}"].baseline for i in (1, 2, 3)} == {rows["0001"].run_id}
    assert rows["0004"].baseline == rows["0004"].run_id, "another learning rate is another config"
    text = shown(look(runs_dir))
    assert "base" in text and "90 %" in text and "50 %" in text
    assert "eff.: tokens/s a process over that of ddp 1×1 00010" in text


def test_of_equal_worlds_the_one_on_fewest_nodes_is_the_base(runs_dir: Path) -> None:
    point(runs_dir, 1, tokens_per_s=1000, cluster__nodes=2)
    point(runs_dir, 2, tokens_per_s=900, cluster__processes_per_node=2)
    assert {row.baseline for row in look(runs_dir).rows} == {f"{2:04x}{'0' * 8}"}


def test_a_run_without_speed_is_no_base(runs_dir: Path) -> None:
    point(runs_dir, 1, steps=0, state="OUT_OF_MEMORY")
    point(runs_dir, 2, tokens_per_s=1000, cluster__processes_per_node=2)
    rows = {row.run_id[:4]: row for row in look(runs_dir).rows}
    assert rows["0001"].efficiency is None
    assert rows["0002"].efficiency == 1.0
    assert "eff.:" not in shown(look(runs_dir)), "nobody is compared with it"


def test_profiled_steps_are_left_out_of_the_speed() -> None:
    def line(step: int, took: float, **more: bool) -> dict[str, Any]:
        return {"step": step, "step_s": took, "tokens_per_s": 100 / took, **more}

    lines = [line(1, 9.0), line(2, 1.0), line(3, 5.0, profiled=True), line(4, 1.0)]
    assert compare_row.speed(lines) == (100.0, 1.0)
    assert compare_row.speed([line(1, 9.0), line(2, 5.0, profiled=True)]) == (20.0, 5.0)


# --- order


def test_the_quickest_comes_first_and_what_has_no_value_last(runs_dir: Path) -> None:
    point(runs_dir, 1, tokens_per_s=10, seed=1)
    point(runs_dir, 2, steps=0, seed=2, state="FAILED")
    point(runs_dir, 3, tokens_per_s=30, seed=3, memory=900 * MIB)
    assert [row.config["seed"] for row in look(runs_dir).rows] == [3, 1, 2]
    assert [row.config["seed"] for row in look(runs_dir, sort="memory").rows] == [1, 3, 2]
    assert [row.config["seed"] for row in look(runs_dir, sort="run").rows] == [1, 2, 3]


def test_every_sort_works_and_the_command_knows_it(runs_dir: Path) -> None:
    assert tuple(compare.SORTS) == compare_verb.SORTS
    for number in (1, 2):
        point(runs_dir, number, seed=number, steps=4 * (number - 1))
    for sort in compare.SORTS:
        assert len(look(runs_dir, sort=sort).rows) == 2


# --- ends


def test_memory_that_ran_out_is_a_result(runs_dir: Path) -> None:
    reason = "OutOfMemoryError: CUDA out of memory (rank 1, node c2)"
    run = point(runs_dir, 1, state="OUT_OF_MEMORY", reason=reason, steps=2)
    run.errors.mkdir()
    record = {
        "time": "2099",
        "rank": 1,
        "node": "c2",
        "type": "OutOfMemoryError",
        "peak_memory_bytes": 5 << 30,
    }
    write_json(run.errors / "try0.0-restart0-rank1.json", record)
    comparison = look(runs_dir)
    assert comparison.rows[0].peak_memory_bytes == 5 << 30
    text = shown(comparison)
    assert "OUT_OF_MEMORY at 5.0 GiB a rank after 2 of 4 steps: OutOfMemoryError: CUDA out of memory" in text


def test_a_killed_rank_says_nothing_but_its_node_was_watched(runs_dir: Path) -> None:
    run = point(runs_dir, 1, state="OUT_OF_MEMORY", reason="SIGKILL: killed by the kernel", steps=0)
    append_line(run.path / "system-c1.jsonl", {"rss_bytes": 3 << 30})
    append_line(run.path / "system-c2.jsonl", {"rss_bytes": 4 << 30})
    assert "OUT_OF_MEMORY at 4.0 GiB a node or more after 0 of 4 steps: SIGKILL" in shown(look(runs_dir))
    # A file's last line knows the highest of all.
    append_line(run.path / "system-c2.jsonl", {"rss_bytes": 1 << 30, "peak_rss_bytes": 5 << 30})
    assert "OUT_OF_MEMORY at 5.0 GiB a node or more" in shown(look(runs_dir))


# --- sweeps


def sweep(runs_dir: Path, *runs: RunDir, refused: int = 2) -> str:
    folder = runs_dir / ".sweeps"
    folder.mkdir()
    record = {
        "sweep": "sweep-1",
        "points": [{"overrides": "", "run_id": run.path.name, "run_dir": str(run.path)} for run in runs],
        "refused": [
            {
                "overrides": f"parallel.tp={n}",
                "reason": f"parallel.tp = {n}: no",
                "faults": [{"key": "parallel.tp"}],
            }
            for n in range(3, 3 + refused)
        ],
    }
    write_json(folder / "sweep-1.json", record)
    return "sweep-1"


def test_points_that_were_refused_are_listed(runs_dir: Path) -> None:
    name = sweep(runs_dir, point(runs_dir, 1), point(runs_dir, 2, seed=1))
    point(runs_dir, 3, seed=2)  # none of the sweep's
    comparison = look(runs_dir, name)
    assert len(comparison.rows) == 2
    assert [one.overrides for one in comparison.refused] == ["parallel.tp=3", "parallel.tp=4"]
    text = shown(comparison)
    assert "refused (2)" in text and "parallel.tp=3: parallel.tp = 3: no" in text
    assert compare_plot.default_file(comparison) == runs_dir / ".sweeps" / "sweep-1-compare.png"


def test_a_sweep_of_an_older_version_has_none(runs_dir: Path) -> None:
    name = sweep(runs_dir, point(runs_dir, 1))
    file = runs_dir / ".sweeps" / "sweep-1.json"
    record = json.loads(file.read_text())
    del record["refused"]
    write_json(file, record)
    assert look(runs_dir, name).refused == ()


def test_as_json_has_everything(runs_dir: Path) -> None:
    name = sweep(
        runs_dir, point(runs_dir, 1), point(runs_dir, 2, optim__lr=0.5, state="FAILED", reason="boom")
    )
    plain = json.loads(json.dumps(compare_view.as_json(found := look(runs_dir, name), judged(found))))
    assert plain["differs"] == ["optim.lr"]
    assert [one["faults"][0]["key"] for one in plain["refused"]] == ["parallel.tp"] * 2
    assert {run["state"]: run["reason"] for run in plain["runs"]} == {"COMPLETED": "", "FAILED": "boom"}
    assert set(plain["runs"][0]) >= {
        *("run_id", "run_dir", "strategy", "degrees", "nodes", "processes", "config", "tokens_per_s"),
        *("efficiency", "baseline", "step_s", "peak_memory_bytes", "comm_s", "comm_bytes", "comm_share"),
        *("loss", "eval_loss", "step", "max_steps"),
    }


# --- the table


def many(runs_dir: Path) -> Comparison:
    extra = {"comm_s": 0.02, "comm_bytes": 4 * MIB, "comm_share": 0.123}
    for number in range(1, 4):
        point(runs_dir, number, cluster__nodes=number, extra=extra, optim__lr=0.1 * number, tokens_per_s=9999)
    return look(runs_dir)


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_table_fits_its_terminal(runs_dir: Path, width: int) -> None:
    text = shown(many(runs_dir), width)
    assert max(map(len, text.splitlines())) <= width
    head = text.splitlines()[0]
    for word in ("strategy", "n×p", "tokens/s", "eff.", "step", "memory", "comm", "loss", "state"):
        assert word in head
    assert "…" not in text.splitlines()[1]
    hidden = [line for line in text.splitlines() if line.startswith("not shown")]
    assert bool(hidden) == (width < 120)


def test_degrees_stay_where_nothing_else_tells_runs_apart(runs_dir: Path) -> None:
    shape = {"cluster__nodes": 2, "cluster__processes_per_node": 2, "optim__lr": 0.123456}
    point(runs_dir, 1, parallel__tp=2, **shape, state="OUT_OF_MEMORY")
    point(runs_dir, 2, **shape)
    text = shown(look(runs_dir), 80)
    assert "degrees" in text.splitlines()[0] and "rep2 tp2" in text and "held-out" not in text.splitlines()[0]


def test_ids_are_as_short_as_tells_them_apart() -> None:
    assert compare_text.short_ids(["abcdef1", "abcdef2"]) == {"abcdef1": "abcdef1", "abcdef2": "abcdef2"}
    assert compare_text.short_ids(["abcdefgh", "xbcdefgh"]) == {"abcdefgh": "abcde", "xbcdefgh": "xbcde"}


def test_keys_with_the_same_last_part_are_written_out() -> None:
    assert compare_view._headers(["a.lr", "b.rank", "c.rank"]) == [
        ("a.lr", "lr"),
        ("b.rank", "b.rank"),
        ("c.rank", "c.rank"),
    ]


# --- the picture


def test_the_picture(runs_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for number, strategy in enumerate(("ddp", "ddp", "fsdp", "fsdp")):
        processes = number % 2 + 1
        state = "OUT_OF_MEMORY" if number == 3 else "COMPLETED"
        point(
            runs_dir,
            number,
            parallel__name=strategy,
            cluster__processes_per_node=processes,
            state=state,
            parallel__dp_shard=-1 if strategy == "fsdp" else 1,
            parallel__dp_replicate=1 if strategy == "fsdp" else -1,
        )
    comparison = look(runs_dir)
    assert list(compare_plot.series(comparison.rows)) == ["ddp", "fsdp"]
    file = tmp_path / "a.png"
    compare_plot.draw(comparison, judged(comparison), file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_lines_of_one_strategy_are_told_apart(runs_dir: Path) -> None:
    point(runs_dir, 1, optim__lr=0.1)
    point(runs_dir, 2, optim__lr=0.2)
    assert list(compare_plot.series(look(runs_dir).rows)) == ["ddp lr=0.1", "ddp lr=0.2"]


def test_what_keeps_a_picture_from_being_drawn(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"ends in \.png"):
        compare_plot.check_name(Path("sweep-1"))
    point(runs_dir, 1, steps=0, state="FAILED")
    with pytest.raises(UsageError, match="nothing to draw"):
        compare_plot.draw(found := look(runs_dir), judged(found), tmp_path / "a.png")
    point(runs_dir, 2)
    with pytest.raises(UsageError, match="can't be written"):
        compare_plot.draw(found := look(runs_dir), judged(found), tmp_path / "no" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        compare_plot.draw(found := look(runs_dir), judged(found), tmp_path / "a.png")
