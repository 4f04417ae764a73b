"""`hpcdl report`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import left_out, say

HELP = "a run or a sweep as one page: curves, memory, timeline, cost, config"
RUNS = "runs"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run; or a sweep, or several runs: side by side"
    )
    parser.add_argument(
        "--format", default=None, metavar="FORMATS", help="of html, md, json, with commas (default: html)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE|DIR",
        help="(default: report.html in the run's directory, or beside the sweep's record)",
    )
    parser.add_argument("--price-gpu-hour", type=price, metavar="PRICE", help="what a GPU costs an hour")
    parser.add_argument("--price-cpu-hour", type=price, metavar="PRICE", help="what a CPU costs an hour")


def price(text: str) -> float:
    """Argparse's type of an amount of money."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no price: a number from 0 on, as 2.5")
    return value


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.report import files, make
    from hpcdl.report.cost import Prices
    from hpcdl.runs import query

    wanted = files.wanted(options.format, options.output)
    prices = Prices(cpu_hour=options.price_cpu_hour, gpu_hour=options.price_gpu_hour)
    made = make.report(options.runs, query.runs_dir(options.runs_dir), prices)
    for path in files.write(made, wanted):
        say(str(path))
    left_out(made.left_out)
    return 0
