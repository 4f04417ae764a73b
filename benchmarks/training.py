#!/usr/bin/env python3
"""What does hpcdl's loop cost a training step, beside a plain torch loop, accelerate, HF Trainer and Lightning?

    python benchmarks/training.py --setup      installs Lightning once, over this Python's own torch
    python benchmarks/training.py              steps of about 190 ms and below 10 ms, in one process and in two (DDP)

All programs are alive at once and take turns of a few steps; a ratio is taken within a round of turns. hpcdl is a run
as `hpcdl launch` makes it, its agent, torchrun and signs of life included, once with the monitor and once without; each
program starts from the same file of weights. What a program was given and what loss came of it is noted at each step
and compared after the last one: other token ids, or a loss
further off than 1e-5 (1e-3 after 20 steps, when rounding has grown), and nothing is reported.

`torch, again` is the plain loop a second time: its ratio to itself says how far apart equal programs come out here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from _peers import HERE, LIGHTNING, prepare
from _programs import (
    AGAIN,
    BARE,
    FRAMEWORKS,
    NAMES,
    OURS,
    TORCH,
    Regime,
    environment,
    make_inputs,
    start_program,
)
from _results import Goal, tell
from _timing import interval, machine, mark, markdown
from _turns import Gatekeeper, Program, Took, TurnError, end

LONG_GOAL = 1.01
"""Steps of 190 ms: no overhead that anyone has measured, in any of the peers."""
CLOSE = 1e-5
"""The losses of one of the first steps may be so far apart, relative."""
SURE = 20
"""Steps after which rounding has grown: ranks add gradients up in any order, Adam divides small ones by small."""
DRIFTED = 1e-3
"""So far apart may later losses be; that the data is the same is told by hashes."""
STILL = {
    TORCH: "nothing but the step",
    AGAIN: "the same: what two equal programs differ by here",
    "accelerate": "its loader shares batches out among ranks, one read ahead",
    "trainer": "counts targets over all ranks, looks for NaN, calls callbacks",
    "lightning": "calls hooks and callbacks, one batch read ahead",
    OURS: "gradient norm in fp64, loss over all ranks' tokens, NaN check, stop signals, signs of life, memory; "
    "its agent samples the processes every 5 s",
    BARE: "the same without the monitor",
}


REGIMES = {
    "long": Regime(
        name="long", hidden_size=256, layers=4, seq_len=256, rows=2, turn=5, rounds=16, quick_rounds=5, warm_up=12
    ),
    "short": Regime(
        name="short", hidden_size=32, layers=2, seq_len=32, rows=2, turn=60, rounds=40, quick_rounds=16, warm_up=60
    ),
}  # fmt: skip


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # not without its programs
    args = arguments()
    if args.prepare:
        make_inputs(Path(args.prepare), json.loads((Path(args.prepare) / "setting.json").read_text()))
        return 0
    missing = prepare(setup=args.setup, wanted=(LIGHTNING,))
    names = [one for one in NAMES if one not in missing and one in (TORCH, *(args.only or NAMES))]
    cases: list[dict[str, Any]] = []
    for name in args.regimes:
        for ranks in args.processes:
            try:
                cases.append(measure(chosen(args, REGIMES[name], ranks), ranks, names))
            except TurnError as error:
                cases.append({"regime": name, "processes": ranks, "fault": str(error)})
    report = {"machine": machine(), "cases": cases, "not_measured": missing}
    return tell(report, as_text(report), [goal for case in cases for goal in goals(case)], as_json=args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setup", action="store_true", help="install Lightning into ~/.cache/hpcdl-bench")
    parser.add_argument("--regimes", nargs="+", choices=tuple(REGIMES), default=list(REGIMES))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, help="turns of each program (default: by the regime)")
    parser.add_argument("--turn", type=int, help="steps of a turn (default: by the regime)")
    parser.add_argument("--warm-up", type=int, help="steps before that (default: by the regime)")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these programs, and torch")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(args: argparse.Namespace, regime: Regime, ranks: int) -> Regime:
    """The regime with what the command line says, and as many rows a rank on any number of ranks."""
    quick = regime.quick_rounds if args.quick else regime.rounds
    return replace(
        regime,
        rows=regime.rows * ranks,
        rounds=args.rounds or quick,
        turn=args.turn or regime.turn,
        warm_up=args.warm_up or regime.warm_up,
    )


def measure(regime: Regime, ranks: int, names: Sequence[str]) -> dict[str, Any]:
    """All programs in turns, then whether they have done the same.

    Raises:
        TurnError: one failed, or did something else than the others.
    """
    # some more than are timed: who reads ahead must not come to the end meanwhile
    steps = regime.warm_up + regime.rounds * regime.turn + 8
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-") as scratch:
        folder = Path(scratch)
        setting = {**asdict(regime), "shape": regime.shape, "steps": steps, "lr": 1e-4, "seed": 0}
        (folder / "setting.json").write_text(json.dumps(setting))
        made = [sys.executable, str(HERE / "training.py"), "--prepare", scratch]
        subprocess.run(made, check=True, env=environment())
        keeper = Gatekeeper(folder)
        programs = [start_program(name, folder, regime, ranks, steps) for name in names]
        try:
            keeper.gather(programs)
            took = take_turns(keeper, programs, regime)
            for program in programs:
                keeper.dismiss(program)
        finally:
            end(programs)
            keeper.close()
        compared = must_be_alike(folder, programs, json.loads((folder / "targets.json").read_text()))
    return {
        "regime": regime.name,
        "processes": ranks,
        "model": setting["shape"],
        "rows": regime.rows,
        "seq_len": regime.seq_len,
        "rounds": regime.rounds,
        "turn": regime.turn,
        "load_1min": [round(load, 2), round(os.getloadavg()[0], 2)],
        "programs": [row(program, took) for program in programs],
        **compared,
    }


def take_turns(keeper: Gatekeeper, programs: Sequence[Program], regime: Regime) -> dict[str, list[Took]]:
    """Every program once a round, each round beginning with another one; the first turns don't count."""
    took: dict[str, list[Took]] = {program.name: [] for program in programs}
    for program in programs:
        keeper.turn(program, regime.warm_up)
    for number in range(regime.rounds):
        first = number % len(programs)
        order = [*programs[first:], *programs[:first]]
        for program in order if number % 2 else order[::-1]:
            took[program.name].append(keeper.turn(program, regime.turn))
        print(f"{regime.name}: round {number + 1} of {regime.rounds}", file=sys.stderr, flush=True)
    return took


# --- the same work? -----------------------------------------------------------------------------------------


def must_be_alike(folder: Path, programs: Sequence[Program], targets: Sequence[int]) -> dict[str, Any]:
    """That all have read the same batches and come to the same losses.

    Raises:
        TurnError: they have not.
    """
    told = {program.name: told_by(folder, program, targets) for program in programs}
    hashes, losses = told[TORCH]
    worst = 0.0
    for name, (others, their_losses) in told.items():
        if others != hashes:
            step = next((n for n, (a, b) in enumerate(zip(others, hashes, strict=False), 1) if a != b), 0)
            raise TurnError(f"{name} has read other batches than {TORCH}: {differs(others, hashes, step)}")
        for step, (one, other) in enumerate(zip(their_losses, losses, strict=True), start=1):
            apart = abs(one - other) / abs(other)
            worst = max(worst, apart)
            if not apart <= (CLOSE if step <= SURE else DRIFTED):
                raise TurnError(
                    f"{name}'s loss of step {step} is {one}, {TORCH}'s {other}: {apart:.1e} apart"
                )
    return {"steps_compared": len(losses), "losses_apart": worst, "losses": [losses[0], losses[-1]]}


def differs(one: Sequence[Any], other: Sequence[Any], step: int) -> str:
    return f"from step {step} on" if step else f"{len(one)} steps and {len(other)}"


def told_by(folder: Path, program: Program, targets: Sequence[int]) -> tuple[list[list[str]], list[float]]:
    """Each step's hashes, a rank each, and its loss: the mean over all ranks' targets."""
    records = [
        json.loads((folder / f"{program.name}-{rank}.json").read_text()) for rank in range(program.ranks)
    ]
    hashes = [list(each) for each in zip(*(record["hashes"] for record in records), strict=True)]
    if program.name in (OURS, BARE):  # says the mean over all ranks itself, on each
        return hashes, list(records[0]["losses"])
    sums = zip(*(record["losses"] for record in records), strict=True)
    return hashes, [sum(each) / count for each, count in zip(sums, targets, strict=True)]


# --- the report ---------------------------------------------------------------------------------------------


def row(program: Program, took: dict[str, list[Took]]) -> dict[str, Any]:
    """A program's medians; what it takes beside the plain loop, and hpcdl beside it, round by round."""
    mine = took[program.name]
    line: dict[str, Any] = {
        "name": program.name,
        "step_ms": 1e3 * median(turn.wall_s for turn in mine),
        "cpu_ms": 1e3 * median(turn.cpu_s for turn in mine),
        "peak_mib": round(program.peak_bytes / 2**20),
        "still": STILL[program.name],
        "beside_torch": ratios(mine, took[TORCH]),
    }
    if OURS in took and program.name not in (OURS, BARE):
        line["hpcdl_beside_it"] = ratios(took[OURS], mine)
    return line


def ratios(ours: Sequence[Took], theirs: Sequence[Took]) -> dict[str, Any]:
    wall = interval([turn.wall_s for turn in ours], [turn.wall_s for turn in theirs])
    cpu = interval([turn.cpu_s for turn in ours], [turn.cpu_s for turn in theirs])
    return {"wall_s": asdict(wall), "cpu_s": asdict(cpu)}


def judged_by(case: dict[str, Any]) -> str:
    """Wall time; CPU time where others took the cores from the programs meanwhile."""
    return "cpu_s" if max(case["load_1min"]) > case["processes"] + 1 else "wall_s"


def goals(case: dict[str, Any]) -> list[Goal]:
    """What is asked of hpcdl in a case, with its monitor and without."""
    title = f"{case['regime']} steps, {many(case['processes'], 'process')}"
    if "fault" in case:
        return [(f"{title}: FAILED: {case['fault']}", None)]
    by = judged_by(case)
    beside = {line["name"]: line["beside_torch"][by]["median"] for line in case["programs"]}
    peers = [name for name in FRAMEWORKS if name in beside]
    if case["regime"] == "long":
        limit, of = LONG_GOAL, ""
    elif peers:
        best = min(peers, key=lambda name: beside[name])
        limit, of = beside[best], f" ({best}'s, the quickest framework)"
    else:
        return [(f"{title}: no framework to compare with", None)]
    said = "wall time" if by == "wall_s" else "CPU time, THE MACHINE WAS BUSY:"
    found: list[Goal] = []
    for line in case["programs"]:
        if line["name"] in (OURS, BARE):
            ratio = line["beside_torch"][by]
            words = f"{title}, {line['name']}: at most {limit:.3f} × torch{of}; {said} {came(ratio, limit)}"
            found.append((words, ratio["median"] <= limit))
    return found


def came(ratio: dict[str, Any], limit: float) -> str:
    """What came out; where the interval lies on both sides of the limit, it could not be told, and that is said."""
    unsure = ", BUT THE INTERVAL COVERS BOTH" if ratio["low"] <= limit < ratio["high"] else ""
    return f"{spread(ratio)}{unsure}"


def as_text(report: dict[str, Any]) -> str:
    parts = [str(report["machine"])]
    for case in report["cases"]:
        if "fault" not in case:
            parts += [title(case), table(case)]
        parts += [f"goal: {text}: {word(good)}" for text, good in goals(case)]
    parts += [f"NOT MEASURED: {name}: {reason}" for name, reason in report["not_measured"].items()]
    parts.append(
        "What each does beside the step:\n" + "\n".join(f"{one}: {still}" for one, still in STILL.items())
    )
    return "\n\n".join(parts)


def word(good: bool | None) -> str:
    return {True: "met", False: "MISSED", None: "not measured"}[good]


def many(count: int, what: str) -> str:
    return f"{count} {what}{'es' * (count > 1)}"


def title(case: dict[str, Any]) -> str:
    model, load = case["model"], case["load_1min"]
    return (
        f"{case['regime']} steps, {many(case['processes'], 'process')} of one thread: {model['num_hidden_layers']}"
        f" layers of {model['hidden_size']}, {case['rows']} × {case['seq_len']} tokens a step\n"
        f"{case['rounds']} rounds of {case['turn']} steps, load {load[0]} before and {load[1]} after; the batches of"
        f" {case['steps_compared']} steps are alike, losses within {case['losses_apart']:.0e}\n"
        "ratios: medians over rounds, with the bootstrap's 95 % of the median"
    )


HEAD = ("", "step ms", "CPU ms", "wall ÷ torch", "CPU ÷ torch", "hpcdl ÷ it, wall", "CPU", "peak MiB", "")


def table(case: dict[str, Any]) -> str:
    by = judged_by(case)
    return markdown(HEAD, [cells(line, by) for line in case["programs"]])


def cells(line: dict[str, Any], by: str) -> list[str]:
    ours = line.get("hpcdl_beside_it")
    shown = [spread(ours[key]) if ours else "" for key in ("wall_s", "cpu_s")]
    beside = [spread(line["beside_torch"][key]) for key in ("wall_s", "cpu_s")]
    who = mark(ours[by]["low"], ours[by]["high"]) if ours else ""
    return [
        line["name"], f"{line['step_ms']:.2f}", f"{line['cpu_ms']:.2f}", *beside, *shown, str(line["peak_mib"]), who,
    ]  # fmt: skip


def spread(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
