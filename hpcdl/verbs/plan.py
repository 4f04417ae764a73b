"""`hpcdl plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hpcdl.verbs._common import aside, console, print_json, remark, say

if TYPE_CHECKING:
    from hpcdl.launch.foreseen import Foreseen

HELP = "memory, time and cost of an experiment before it is launched; submits nothing"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.description = (
        "Composes what hpcdl launch would with the same words, and says what it will take: bytes of each process, "
        "whether they fit, seconds of a step, duration, hours, disk, and on a cluster when it would start."
    )
    parser.add_argument(
        "words", nargs="*", metavar="OVERRIDE", help="as of hpcdl launch: +experiment=NAME KEY=VALUE …"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: a line for each point")
    parser.add_argument("--config-dir", metavar="DIR", help="configs beside hpcdl's own")
    parser.add_argument("--config-name", metavar="NAME", help="another root than config.yaml")
    parser.add_argument("--json", action="store_true", help="everything, for scripts: with -m a list")
    parser.add_argument("--png", metavar="FILE", type=Path, help="the bar as a picture (.png, .svg, .pdf)")
    parser.add_argument(
        "--search",
        action="store_true",
        help="the quickest way to share it out that fits, whatever parallel= says",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="fit the planner's constants to the finished runs of --runs-dir",
    )


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.plan import bar, view

    picture = bar.check_name(options.png) if options.png else None
    if options.calibrate:
        return _calibrate(options)
    from hpcdl.launch import foreseen

    found = foreseen.read(_argv(options))
    if options.search:
        return _search(found, options)
    shown = found.shown()
    if options.json:
        plain = [view.as_json(each) for each in shown]
        print_json(plain if options.multirun else plain[0])
    elif len(shown) == 1:
        view.show(console(), shown[0])
    else:
        view.show_many(console(), shown)
    for line in found.refused_lines():
        aside(line)
    if picture is not None:
        bar.draw(*view.picture(shown), picture)
        remark(f"picture: {picture}")
    return 0


def _argv(options: argparse.Namespace) -> list[str]:
    """The command line of a launch."""
    flags = ["--multirun"] * options.multirun
    flags += [f"--config-dir={options.config_dir}"] if options.config_dir else []
    flags += [f"--config-name={options.config_name}"] if options.config_name else []
    folder = [f"runs_dir={options.runs_dir}"] if options.runs_dir else []
    return [*flags, *options.words, *folder]


def _search(found: Foreseen, options: argparse.Namespace) -> int:
    from hpcdl.plan import search_view

    results = found.searched()
    if options.json:
        plain = [result.json() for _, result in results]
        print_json(plain if options.multirun else plain[0])
    else:
        for label, result in results:
            if label:
                say(f"{label}\n")
            search_view.show(console(), result)
    if options.png:
        search_view.draw(results[0][1], options.png)
        remark(f"picture: {options.png}")
    return 0 if all(result.chosen is not None for _, result in results) else 1


def _calibrate(options: argparse.Namespace) -> int:
    from hpcdl.launch import calibrating
    from hpcdl.runs import query

    folder = query.runs_dir(options.runs_dir)
    found = calibrating.calibrate(folder)
    for line in calibrating.in_words(found, folder):
        say(line)
    return 0 if found.memory or found.rates else 1
