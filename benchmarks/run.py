#!/usr/bin/env python3
"""Runs the benchmarks one after the other and writes docs/benchmarks.md: what `make bench` does.

    python benchmarks/run.py                          all: about three hours on 2 cores
    python benchmarks/run.py --only training,launch   these; of the others the last results stay, with their dates
    python benchmarks/run.py --quick                  fewer rounds, and only what takes minutes
    python benchmarks/run.py --list

Each result is a file below benchmarks/results; the page is written anew, atomically, after each benchmark, from all of
them: what is killed leaves what was measured until then. A benchmark that fails, or can't run here, is a row that says
so, and its last result stays below it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from _listed import BENCHMARKS, Benchmark
from _page import page
from _peers import CHECKOUT, HERE, LAUNCHERS, LIGHTNING, prepare
from _record import Record, machine_of, read_all, revision, write
from _results import PLACE

from hpcdl.runs.files import write_atomic

PAGE = CHECKOUT / "docs" / "benchmarks.md"
RESULTS = HERE / "results"


def main() -> int:
    args = arguments()
    if args.list:
        for one in BENCHMARKS:
            print(f"{one.name:18} about {one.minutes:3} min  {one.question}")
        return 0
    chosen = [one for one in BENCHMARKS if one.name in args.only] if args.only else everything(args.quick)
    if not args.page:
        missing = prepare(setup=not args.no_setup, wanted=(*LAUNCHERS, LIGHTNING))
        for name, reason in missing.items():
            print(f"peer {name}: {reason}", file=sys.stderr)
    failed = 0
    for one in () if args.page else chosen:
        record = run(one, quick=args.quick, place=HERE, results=RESULTS)
        failed += record.ran and record.fault is not None
        write_page(RESULTS, PAGE)
        print(f"{one.name}: {record.verdict}, {record.seconds:.0f} s", file=sys.stderr, flush=True)
    write_page(RESULTS, PAGE)
    return 1 if failed else 0  # a goal that is missed is a result


def arguments() -> argparse.Namespace:
    names = [one.name for one in BENCHMARKS]

    def several(words: str) -> list[str]:
        asked = words.replace(",", " ").split()
        if wrong := sorted(set(asked) - set(names)):
            raise argparse.ArgumentTypeError(
                f"no such benchmark: {', '.join(wrong)}; there are {', '.join(names)}"
            )
        return asked

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=several, default=[], metavar="NAME,…", help="these")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds; without --only what takes minutes"
    )
    parser.add_argument("--no-setup", action="store_true", help="install no peer that is missing")
    parser.add_argument("--page", action="store_true", help="only write the page from the results there are")
    parser.add_argument("--list", action="store_true", help="say what there is")
    return parser.parse_args()


def everything(quick: bool) -> list[Benchmark]:
    """All of them, or those that have a quick way."""
    return [one for one in BENCHMARKS if not quick or one.quick is not None]


def write_page(results: Path, file: Path) -> None:
    write_atomic(file, page(BENCHMARKS, read_all(results)))


def run(one: Benchmark, *, quick: bool, place: Path, results: Path) -> Record:
    """Runs one and keeps its record, whatever comes of it.

    Args:
        one: which.
        quick: in fewer rounds, where it has a way.
        place: where its file lies.
        results: where records are kept.
    """
    options = one.quick if quick and one.quick is not None else one.options
    shown = ("python", f"benchmarks/{one.file}", *options)
    begun, started, load = datetime.now(UTC), time.monotonic(), os.getloadavg()[0]
    reason = lacking = one.cannot()
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-") as scratch:
        left, output = Path(scratch) / "result.json", Path(scratch) / "output"
        if reason is None:
            reason = outcome((sys.executable, str(place / one.file), *options), left, output, one.limit_s)
        record = Record.of(
            name=one.name,
            command=" ".join(shown),
            quick=quick and options is one.quick,
            date=begun.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - started, 1),
            load=(round(load, 2), round(os.getloadavg()[0], 2)),
            revision=revision(CHECKOUT),
            machine=machine_of(),
            fault=reason,
            ran=lacking is None,
            left=left,
            text=output.read_text(errors="replace") if output.exists() else "",
        )
    write(results, record)
    return record


def outcome(argv: Sequence[str], left: Path, output: Path, limit_s: float) -> str | None:
    """Runs a command with its output in a file.

    Returns:
        Why it has failed; None where it left a result.
    """
    errors = output.with_name("errors")
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(
            argv, cwd=CHECKOUT, env={**os.environ, PLACE: str(left)}, stdin=subprocess.DEVNULL, stdout=out,
            stderr=err,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"not done after {limit_s / 60:.0f} minutes: ended"
        finally:
            process.terminate()
            stop(process)
    if left.exists():
        return None
    words = errors.read_text(errors="replace").strip().splitlines()[-12:]
    return "\n".join([f"exit code {code}, and no result", *words])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Waits for a process that was asked to end."""
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
