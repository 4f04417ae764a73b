from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from hpcdl.errors import RunFailedError, UsageError
from hpcdl.runs import result, status, words
from hpcdl.runs.files import append_line, write_json
from hpcdl.runs.reconcile import View, look, read, reconcile
from hpcdl.runs.store import RunDir, all_runs
from tests.runs.making import FakeJob, FakeSlurm, add_steps, ago, make_run


def show(view: View | list[View], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    if isinstance(view, list):
        status.print_table(console, view, view)
    else:
        status.print_detail(console, view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def failed(runs_dir: Path) -> RunDir:
    run = make_run(
        runs_dir,
        "77aa0c12bd01",
        name="an_experiment_with_a_long_name",
        state="OUT_OF_MEMORY",
        reason="MemoryError: 12 GiB (rank 1, node c2)",
        job_id="1234567_89",
        nodes=2,
        world_size=4,
        node_list=("c1", "c2"),
        started=ago(90),
        ended=ago(10),
        exit_code=1,
        requeues=1,
    )
    add_steps(run, range(1, 43))
    run.event("failed", reason="MemoryError: 12 GiB", traceback="Traceback (most recent call last):\n  x[0]")
    return run


def test_json_has_exactly_the_fixed_names(runs_dir: Path) -> None:
    plain = status.as_json(look(failed(runs_dir)))
    # issue 2's design, «Fixed names»
    names = (
        "run_id name state reason job_id run_dir nodes world_size step max_steps restarts requeues exit_code"
    )
    assert " ".join(plain) == f"{names} created started ended"
    assert (plain["step"], plain["job_id"], plain["state"]) == (42, "1234567_89", "OUT_OF_MEMORY")
    json.dumps(plain)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_cuts_only_names(runs_dir: Path, width: int) -> None:
    failed(runs_dir)
    make_run(runs_dir, "bbbbbbbbbbbb", kind="local", state="COMPLETED", submission=None)
    out = show(read(all_runs(runs_dir)).views, max(width, 80))
    for whole in ("77aa0c12bd01", "OUT_OF_MEMORY", "42/100", "1234567_89", "bbbbbbbbbbbb", "local"):
        assert whole in out
    assert max(map(len, out.splitlines())) <= max(width, 80)
    assert out.splitlines()[-1] == "1 COMPLETED · 1 OUT_OF_MEMORY"


def test_the_detail_tells_reason_traceback_and_what_to_type(runs_dir: Path) -> None:
    out = show(look(failed(runs_dir)))
    for words_ in (
        "MemoryError: 12 GiB (rank 1, node c2)",
        "Traceback (most recent call last):\n  x[0]",
        "2 (c1, c2), 4 processes",
        "step 42/100, loss 3.1600, 1,234 tokens/s",
        "took 1:20",
        "1 requeues",
        "hpcdl launch …",
    ):
        assert words_ in out


def test_the_detail_of_a_running_run(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, state="RUNNING", job_id="4_0", started=ago(5))
    fake.jobs["4"] = [FakeJob("RUNNING", "0")]
    append_line(run.metrics_file, {"step": 0, "eval_loss": 3.0, "eval_perplexity": 20.0})
    add_steps(run, range(1, 3))
    append_line(run.metrics_file, {"step": 2, "eval_loss": 2.0, "eval_perplexity": 10.0})
    out = show(look(run, fake.slurm()))
    assert "perplexity 20.000 (step 0) → 10.000 (step 2)" in out
    assert "hpcdl cancel aaaa11112222" in out


def test_whom_the_others_wait_for(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, state="RUNNING", kind="local")
    about = {
        "rank": 3,
        "node": "c2",
        "slower_by": 1.818,
        "cause": "loading data",
        "why": "60 ms",
        "since_step": 40,
    }
    run.event("straggler", **about)
    words = "rank 3, node c2: 1.82 times the others' own time since step 40: loading data (60 ms)"
    assert status.straggler(run.events()) == words
    assert words in " ".join(show(View(run=run, state=run.read_state())).split())
    run.event("straggler", **{**about, "ranks": [2, 3]})
    assert status.straggler(run.events()).startswith("all ranks of node c2")
    run.event("straggler_over", **about)
    assert status.straggler(run.events()) == ""
    run.event("straggler", **about)
    run.event("started")
    assert status.straggler(run.events()) == ""


def test_the_result(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="COMPLETED")
    (run.path / "card.md").write_text("x")
    record = {
        "eval_loss_before": 3.25,
        "eval_loss_after": 2.99,
        "eval_perplexity_before": 25.79,
        "eval_perplexity_after": 19.88,
        "steps": 30,
        "tokens": 30720,
        "train_s": 83.0,
        "tokens_per_s": 370.1,
        "peak_memory_bytes": 3 << 30,
        "world_size": 2,
        "nodes": 1,
        "mfu": None,
        "trainable_parameters": 10,
        "parameters": 1000,
        "adapter": None,
        "sample": {"prompt": "The [x]", "before": "The [x] a\nb", "after": " c"},
    }
    write_json(run.result_file, record)
    console = Console(file=io.StringIO(), width=100, highlight=False)
    view = look(run)
    result.print_result(console, view, result.load(view))
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    for text in ("25.7900", "19.8800", "-22.9 %", "30 steps, 30,720 tokens, in 1:23", "3.0 GiB", "(1.00 %)"):
        assert text in out
    assert "before   The [x] a⏎ b" in out
    assert "after    The [x] c" in out
    assert "card.md" in out and "loss.png" not in out


def test_no_result(runs_dir: Path, fake: FakeSlurm) -> None:
    run = make_run(runs_dir, "aaaa", job_id="4_0")
    fake.jobs["4"] = [FakeJob("PENDING", "0", "Priority")]
    with pytest.raises(UsageError, match="no result yet: PENDING"):
        result.load(look(run, fake.slurm()))
    with pytest.raises(RunFailedError, match="left no result: FAILED"):
        result.load(look(make_run(runs_dir, "bbbb", state="FAILED")))


@pytest.mark.parametrize(
    ("seconds", "long", "short"),
    [(0, "0:00", "0s"), (61, "1:01", "1m"), (3661, "1:01:01", "1h"), (90061, "1d 1:01:01", "1d")],
)
def test_durations(seconds: float, long: str, short: str) -> None:
    assert (words.duration(seconds), words.age(seconds)) == (long, short)


def test_sizes() -> None:
    assert [words.size(n) for n in (5, 2048, 3 << 20, 3 << 30)] == ["5 B", "2 KiB", "3 MiB", "3.0 GiB"]
    assert [words.short(n) for n in (950, 4650, 12345, 1_200_000)] == ["950", "4,650", "12.3k", "1.20M"]


def test_many_runs_take_one_poll_and_no_time(runs_dir: Path, fake: FakeSlurm) -> None:
    for i in range(2000):
        make_run(
            runs_dir, f"{i:012}", job_id=f"4_{i}", array_index=i, state="PENDING" if i % 2 else "COMPLETED"
        )
    fake.jobs["4"] = [FakeJob("PENDING", "0-1999", "Priority")]
    start = time.monotonic()
    views = reconcile(read(all_runs(runs_dir)).views, fake.slurm())
    assert time.monotonic() - start < 5
    assert len(views) == 2000
    assert fake.names() == ["squeue"]
