"""`hpcdl compare`: metrics that are named, the best, fronts, seeds, and two runs side by side."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpcdl import cli
from hpcdl.errors import UsageError
from hpcdl.runs import compare_groups, compare_metrics, compare_pair, compare_plot
from hpcdl.runs.compare_groups import Asked, Study, judge
from hpcdl.runs.compare_metrics import Metric, direction, front
from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir
from tests.runs.test_compare import MIB, look, point, shown, sweep


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def study(runs_dir: Path, *names: str, **asked: Any) -> Study:
    return judge(look(runs_dir, *names).rows, Asked(**asked))


def seeds_of(
    runs_dir: Path, rates: tuple[float, ...], seeds: int, *, spread: float = 0.2, apart: float = 0.1
) -> None:
    """Runs at these learning rates: a seed is worth up to `spread`, the next rate `apart` more loss."""
    dice = random.Random(1)
    luck = [dice.uniform(-spread, spread) for _ in range(seeds)]
    for place, rate in enumerate(rates):
        for seed in range(seeds):
            loss = 3 + luck[seed] + apart * place + dice.gauss(0, spread / 100)
            run = point(runs_dir, 100 * place + seed, optim__lr=rate, seed=seed)
            write_json(run.result_file, {"eval_loss_after": loss})


# --- which figures, and what is good of them


@pytest.mark.parametrize(
    ("name", "better"),
    [
        *((name, "min") for name in ("loss", "eval_loss", "eval_loss_after", "eval_perplexity", "step_s")),
        *((name, "min") for name in ("peak_memory_bytes", "comm_share", "sample.loss")),
        *((name, "max") for name in ("tokens_per_s", "mfu", "efficiency", "accuracy", "eval_accuracy_after")),
        *((name, "") for name in ("step", "lr", "tokens", "grad_norm")),
    ],
)
def test_what_is_good_of_a_figure(name: str, better: str) -> None:
    assert direction(name) == better


def test_any_figure_may_be_named_and_sorts(runs_dir: Path) -> None:
    for number, norm in ((1, 0.5), (2, 0.1), (3, 0.9)):
        run = point(runs_dir, number, seed=number, cluster__nodes=number, extra={"grad_norm": norm})
        write_json(run.result_file, {"eval": {"bleu": 10 * norm}})
    comparison = look(runs_dir)
    found = judge(comparison.rows, Asked(metric="grad_norm:min,eval.bleu:max"))
    assert [group.mean("grad_norm") for group in found.groups] == [0.1, 0.5, 0.9]
    assert [group.best_in for group in found.groups] == [("grad_norm",), (), ("eval.bleu",)]
    text = shown(comparison, metric="grad_norm:min,eval.bleu:max")
    head, first = text.splitlines()[:2]
    assert "grad_norm" in head and "eval.bleu" in head and "tokens/s" not in head
    assert "0.1*" in first and "9*" in text.splitlines()[3]
    assert "* best: grad_norm 0.1 00020 · eval.bleu 9 00030" in text


def test_a_figure_of_which_nobody_knows_what_is_good_has_no_best(runs_dir: Path) -> None:
    for number in (1, 2, 3):
        point(runs_dir, number, seed=number, extra={"grad_norm": number / 10})
    text = shown(look(runs_dir), metric="grad_norm")
    assert (
        "*" not in text.splitlines()[1] and "of grad_norm no best: say grad_norm:min or grad_norm:max" in text
    )


def test_units_may_be_left_off_and_there_are_other_words(runs_dir: Path) -> None:
    rows = look(runs_dir, point(runs_dir, 1).path.name).rows
    names = [metric.name for metric in compare_metrics.parse("peak_memory,step,memory,speed", rows)]
    assert names == ["peak_memory_bytes", "step", "tokens_per_s"], "named twice is named once"


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        (
            "metric",
            "tokns_per_s",
            "--metric tokns_per_s: no run has such a figure; nearest name: tokens_per_s",
        ),
        ("metric", "", "names no metric"),
        ("metric", "loss:up", "allowed: loss:min"),
        ("metric", "loss:mn", "nearest: loss:min"),
        ("pareto", "tokens_per_s", "a front is of two metrics or more"),
        ("pareto", "loss,grad_norm", "say grad_norm:min or grad_norm:max"),
        ("pareto", "loss,memry", "--pareto memry: no run has such a figure; nearest name: memory"),
    ],
)
def test_what_is_no_metric(
    runs_dir: Path, option: str, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    point(runs_dir, 1, extra={"grad_norm": 0.3})
    assert cli.main(["compare", "tiny", f"--{option}", text, "--runs-dir", str(runs_dir)]) == 2
    assert says in capsys.readouterr().err


# --- the best, and fronts


def test_only_runs_that_completed_can_be_the_best_if_any_has(runs_dir: Path) -> None:
    point(runs_dir, 1, tokens_per_s=900, seed=1)
    point(runs_dir, 2, tokens_per_s=5000, seed=2, state="FAILED")
    speed = Metric(name="tokens_per_s", better="max")
    assert [g.row.seed for g in study(runs_dir, each=True).best(speed)] == [1]
    late = point(runs_dir, 4, tokens_per_s=200, seed=4, state="TIMEOUT").path.name
    failed = look(runs_dir, "0002", late).rows
    assert [g.row.seed for g in judge(failed, Asked(each=True)).best(speed)] == [2], "so far"


def test_where_all_are_alike_none_is_the_best(runs_dir: Path) -> None:
    point(runs_dir, 1, seed=1)
    point(runs_dir, 2, seed=2)
    found = study(runs_dir, each=True, metric="eval_loss,tokens_per_s")
    assert [group.best_in for group in found.groups] == [(), ()]


def test_a_front_is_what_no_other_beats() -> None:
    """Against the definition, over many points."""
    dice = random.Random(2)
    metrics = [Metric(name="a", better="max"), Metric(name="b", better="min"), Metric(name="c", better="min")]
    points: list[dict[str, float]] = [{name: float(dice.randrange(8)) for name in "abc"} for _ in range(300)]
    points += [{"a": 99.0}, {}]
    for axes in (metrics[:2], metrics):
        costs = [tuple(m.cost(p[m.name]) for m in axes) for p in points[:300]]
        alone = {
            i
            for i, one in enumerate(costs)
            if not any(
                other != one and all(a <= b for a, b in zip(other, one, strict=True)) for other in costs
            )
        }
        assert set(front(points, axes)) == alone


def test_the_front_is_marked_everywhere(runs_dir: Path) -> None:
    for number, (speed, memory) in enumerate([(1000, 100), (2000, 300), (900, 200), (2000, 250)]):
        point(runs_dir, number, tokens_per_s=speed, memory=memory * MIB, seed=number)
    point(runs_dir, 9, tokens_per_s=9000, memory=1, state="OUT_OF_MEMORY", seed=9)
    comparison = look(runs_dir)
    found = judge(comparison.rows, Asked(pareto="tokens_per_s,peak_memory", each=True))
    assert {group.row.seed for group in found.groups if group.on_front} == {0, 3}, "nor what has failed"
    text = shown(comparison, pareto="tokens_per_s,peak_memory")
    marked = [line for line in text.splitlines() if line.startswith("◆ ") and "COMPLETED" in line]
    assert sorted(line.split()[-1][:4] for line in marked) == ["0000", "0003"]
    assert "◆ Pareto front (large tokens/s, small memory): 2 of 5" in text


# --- seeds


def test_runs_that_differ_in_their_seed_only_are_one_group(runs_dir: Path) -> None:
    seeds_of(runs_dir, (0.1, 0.2, 0.3), 4)
    point(runs_dir, 99, optim__lr=0.1, seed=7, state="FAILED")
    found = study(runs_dir, metric="eval_loss_after")
    assert found.seeds and [len(group.rows) for group in found.groups] == [5, 4, 4]
    first = found.groups[0].stats["eval_loss_after"]
    assert first.n == 4 and first.sd is not None and first.low is not None and first.low < first.mean
    assert found.groups[0].best_in == ("eval_loss_after",)
    for group in found.groups[1:]:
        test = group.tests["eval_loss_after"]
        # The one that failed has no result: both have the seeds 0 to 3.
        assert test.kind == "paired" and test.p < 0.01 and test.adjusted > test.p
        assert test.low < test.difference < test.high and test.difference > 0
    text = shown(look(runs_dir), each=False, metric="eval_loss_after")
    assert "4/5" in text and "best" in text.splitlines()[1] and "paired by seed" in text


def test_seeds_that_aren_t_the_same_are_no_pairs(runs_dir: Path) -> None:
    seeds_of(runs_dir, (0.1, 0.2), 3)
    write_json(point(runs_dir, 50, optim__lr=0.2, seed=8).result_file, {"eval_loss_after": 3.0})
    test = study(runs_dir, metric="eval_loss_after").groups[1].tests["eval_loss_after"]
    assert (test.kind, test.n) == ("welch", 3)


def test_what_few_seeds_can_show_is_said(runs_dir: Path) -> None:
    seeds_of(runs_dir, (0.1, 0.2), 3)
    write_json(point(runs_dir, 500, optim__lr=0.5, seed=0).result_file, {"eval_loss_after": 9.0})
    found = study(runs_dir, metric="eval_loss_after")
    alone = next(group for group in found.groups if len(group.rows) == 1)
    assert not alone.tests and alone.stats["eval_loss_after"].low is None
    text = shown(look(runs_dir), each=False, metric="eval_loss_after")
    assert "n = 1: one seed says nothing of the spread" in text
    assert "weak: in standard deviations of a run, 3 seeds none below 2.3" in text
    assert compare_groups.least_seen(2) == pytest.approx(4.303, abs=1e-3)


def test_where_nothing_can_be_tested_that_is_said(runs_dir: Path) -> None:
    for number, rate in enumerate((0.1, 0.2)):
        for seed in (0, 1):
            point(runs_dir, 10 * number + seed, optim__lr=rate, seed=seed, tokens_per_s=1000 + number)
    text = shown(look(runs_dir), each=False, metric="eval_loss")
    assert "p: nothing can be said" in text and " p" in text.splitlines()[0]


def test_each_run_for_itself_if_that_is_wanted(runs_dir: Path) -> None:
    seeds_of(runs_dir, (0.1, 0.2), 2)
    assert len(study(runs_dir, each=True).groups) == 4 and not study(runs_dir, each=True).seeds
    text = shown(look(runs_dir), each=True)
    assert "seed" in text.splitlines()[0] and "±" not in text


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_of_seeds_fits_its_terminal(runs_dir: Path, width: int) -> None:
    seeds_of(runs_dir, (0.0001, 0.00025, 0.3), 3)
    comparison = look(runs_dir)
    for asked in ({}, {"pareto": "eval_loss_after,tokens_per_s"}, {"metric": "eval_loss_after"}):
        text = shown(comparison, width, each=False, **asked)
        assert max(map(len, text.splitlines())) <= width
        head = " ".join(text.splitlines()[:2])  # a long name takes two lines
        assert " lr" in head and " n " in head and " p " in head
        assert "2.5e-04" in text or "0.00025" in text


# --- two runs


def pair(runs_dir: Path, *names: str, width: int = 80, **asked: Any) -> str:
    out = io.StringIO()
    comparison = look(runs_dir, *names)
    compare_pair.print_pair(
        Console(file=out, width=width, highlight=False), comparison, judge(comparison.rows, Asked(**asked))
    )
    return out.getvalue()


def test_two_runs_stand_beside_one_another_as_they_were_named(runs_dir: Path) -> None:
    a = point(runs_dir, 1, tokens_per_s=1000, optim__lr=0.1, cluster__nodes=2).path.name
    b = point(runs_dir, 2, tokens_per_s=2000, optim__lr=0.2, memory=150 * MIB).path.name
    lines = pair(runs_dir, a, b).splitlines()
    assert lines[0].split() == ["A", a[:8], "B", b[:8], "B", "/", "A"]
    table = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert table["optim.lr"] == ["0.1", "0.2"] and table["cluster.nodes"] == ["2", "1"]
    assert table["tokens_per_s"] == ["1,000", "2,000", "*", "2.000", "×"]
    assert table["peak_memory_bytes"][-2:] == ["0.500", "×"]
    titles = [line.strip() for line in lines]
    assert titles.index("config") < titles.index("results")
    assert pair(runs_dir, b, a).splitlines()[0].split()[1] == b[:8]


def test_long_values_go_on_several_lines(runs_dir: Path) -> None:
    a = point(runs_dir, 1, data__paths=(f"/data/{'z' * 120}",)).path.name
    b = point(runs_dir, 2).path.name
    text = pair(runs_dir, a, b)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.count("z") == 120


def test_the_command_chooses_the_view(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [point(runs_dir, n, optim__lr=n / 10).path.name for n in (1, 2)]
    assert cli.main(["compare", *names, "--runs-dir", str(runs_dir)]) == 0
    assert "B / A" in capsys.readouterr().out
    names.append(point(runs_dir, 3, optim__lr=0.3).path.name)
    assert cli.main(["compare", *names, "--runs-dir", str(runs_dir)]) == 0
    assert "B / A" not in capsys.readouterr().out


# --- for scripts, and as a picture


def test_json_has_all_of_it(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds_of(runs_dir, (0.1, 0.2), 3)
    name = sweep(runs_dir, *(RunDir(Path(row.run_dir)) for row in look(runs_dir).rows))
    words = [
        "compare",
        name,
        "--json",
        "--pareto",
        "eval_loss_after,tokens_per_s",
        "--runs-dir",
        str(runs_dir),
    ]
    assert cli.main(words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [metric["name"] for metric in plain["metrics"]] == ["eval_loss_after", "tokens_per_s"]
    assert len(plain["groups"]) == 2 and len(plain["runs"]) == 6
    best = plain["groups"][0]
    assert best["pareto"] and best["best_in"] == ["eval_loss_after"] and best["config"] == {"optim.lr": 0.1}
    assert set(best["figures"]["eval_loss_after"]) == {"n", "mean", "sd", "low", "high"}
    assert plain["best"]["eval_loss_after"] == best["runs"] == plain["pareto"]["runs"]
    assert plain["groups"][1]["against_best"]["eval_loss_after"]["kind"] == "paired"
    assert {run["pareto"] for run in plain["runs"]} == {True, False}
    assert plain["runs"][0]["figures"]["eval_loss_after"] > 2


@pytest.mark.parametrize("axes", ["eval_loss_after,tokens_per_s", "eval_loss_after,tokens_per_s,peak_memory"])
def test_the_front_as_a_picture(runs_dir: Path, tmp_path: Path, axes: str) -> None:
    pytest.importorskip("matplotlib")
    seeds_of(runs_dir, (0.1, 0.2, 0.3), 2)
    comparison = look(runs_dir)
    file = tmp_path / "front.png"
    compare_plot.draw(comparison, judge(comparison.rows, Asked(pareto=axes)), file)
    assert file.read_bytes().startswith(b"\x89PNG")
    empty = look(runs_dir, point(runs_dir, 999, steps=0, state="FAILED").path.name)
    lost = Study(
        metrics=(), groups=judge(empty.rows, Asked()).groups, pareto=(Metric(name="loss", better="min"),) * 2
    )
    with pytest.raises(UsageError, match="there is no front to draw"):
        compare_plot.draw(empty, lost, file)
