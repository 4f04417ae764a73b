"""`hpcdl compare`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import console, left_out, print_json, remark

HELP = "runs side by side: speed, scaling, memory, loss"

SORTS = (
    *("tokens_per_s", "efficiency", "step_s", "memory", "comm", "loss", "eval_loss"),
    *("strategy", "processes", "state", "run"),
)
"""What `compare --sort` takes: the keys of hpcdl.runs.compare.SORTS, which this file doesn't import."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or a sweep: all its points")
    parser.add_argument(
        "--sort", default="tokens_per_s", choices=SORTS, metavar="KEY", help=f"one of {', '.join(SORTS)}"
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

    from hpcdl.runs import compare, compare_plot, compare_view, query

    file = compare_plot.check_name(Path(options.plot)) if options.plot else None
    comparison = compare.collect(options.runs, query.runs_dir(options.runs_dir), options.sort)
    if options.json:
        print_json(compare_view.as_json(comparison))
    else:
        compare_view.print_comparison(console(), comparison)
    left_out(comparison.left_out)
    if options.plot is not None:
        file = file or compare_plot.default_file(comparison)
        compare_plot.draw(comparison, file)
        remark(f"plot: {file}")
    return 0
