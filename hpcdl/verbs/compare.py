"""`hpcdl compare`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import console, left_out, print_json, remark

HELP = "runs side by side: what differed, what came out, which is best"
RUNS = "runs"

SORTS = (
    *("tokens_per_s", "efficiency", "step_s", "memory", "comm", "loss", "eval_loss"),
    *("strategy", "processes", "state", "run"),
)
"""What `compare --sort` takes: the keys of hpcdl.runs.compare.SORTS, which this file doesn't import."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or a sweep: all its points")
    parser.add_argument(
        "--metric",
        metavar="NAME,…",
        help="figures to compare, the first one sorts; NAME:min or NAME:max says what is good",
    )
    parser.add_argument(
        "--pareto", metavar="A,B", help="runs that no other beats in these: tokens_per_s,peak_memory"
    )
    parser.add_argument("--sort", choices=SORTS, metavar="KEY", help=f"one of {', '.join(SORTS)}")
    parser.add_argument(
        "--each", action="store_true", help="every run, not those together that differ in seed"
    )
    parser.add_argument("--json", action="store_true", help="everything, points that were refused included")
    parser.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE.png",
        help="a picture (default: beside the sweep, or ./compare.png)",
    )


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from pathlib import Path

    from hpcdl.runs import compare, compare_groups, compare_pair, compare_plot, compare_view, query

    file = compare_plot.check_name(Path(options.plot)) if options.plot else None
    folder = query.runs_dir(options.runs_dir)
    comparison = compare.collect(options.runs, folder, options.sort or "tokens_per_s")
    asked = compare_groups.Asked(
        metric=options.metric, pareto=options.pareto, each=options.each, sort=options.sort
    )
    study = compare_groups.judge(comparison.rows, asked)
    if options.json:
        print_json(compare_view.as_json(comparison, study))
    elif len(comparison.rows) == 2 and not study.seeds:
        compare_pair.print_pair(console(), comparison, study)
    else:
        compare_view.print_comparison(console(), comparison, study)
    left_out(comparison.left_out)
    if options.plot is not None:
        file = file or compare_plot.default_file(comparison)
        compare_plot.draw(comparison, study, file)
        remark(f"plot: {file}")
    return 0
