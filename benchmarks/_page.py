"""docs/benchmarks.md from the records of all benchmarks: nothing is left out, least of all what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from _listed import Benchmark
from _record import Record

HEAD = """\
# Benchmarks

<!-- Written by benchmarks/run.py (make bench) from benchmarks/results: changes here are lost with its next run. -->

Every benchmark of `benchmarks/`, as it came out last, with its date and machine: what hpcdl wins and what it loses.
Ratios are taken within a round or a pair, of programs that take turns; what each one compares with what is told in
`benchmarks/README.md`. `make bench` runs all of it again, `make bench ONLY=training,launch` some, and
`make bench BENCH_QUICK=1` what takes minutes, in fewer rounds.
"""
WORDS = {True: "met", False: "**MISSED**", None: "**not measured**"}


def page(benchmarks: Sequence[Benchmark], records: Mapping[str, Record]) -> str:
    """The whole page."""
    parts = [HEAD, overview(benchmarks, records)]
    parts += [section(one, records.get(one.name)) for one in benchmarks]
    return "\n".join(parts)


def overview(benchmarks: Sequence[Benchmark], records: Mapping[str, Record]) -> str:
    """A row for each, run or not."""
    rows = ["| benchmark | result | measured (UTC) | load before, after | took |", "|---|---|---|---|---|"]
    for one in benchmarks:
        record = records.get(one.name)
        if record is None:
            cells = ["not run by `make bench` yet", "–", "–", f"about {one.minutes} min"]
        else:
            verdict = record.verdict + (", quick" if record.quick else "")
            if record.fault and record.before:
                verdict += f"; the last result is of {day(record.before)}"
            cells = [
                verdict,
                day(record),
                f"{record.load[0]:g}, {record.load[1]:g}",
                f"{record.seconds:,.0f} s",
            ]
        rows.append(f"| [`{one.name}`](#{one.name}) | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def section(one: Benchmark, record: Record | None) -> str:
    """One benchmark."""
    parts = [f"## {one.name}", one.question]
    if record is None:
        parts.append("Not run by `make bench` yet." + elsewhere(one))
    else:
        if record.fault:
            parts += [f"**{record.verdict}** on {day(record)}: `{record.command}`", fenced(record.fault)]
        shown = record.before if record.fault else record
        if shown is not None:
            parts += [told(shown), markdown(shown.text)]
        else:
            parts.append("There is no earlier result by `make bench`." + elsewhere(one))
    return "\n\n".join(parts) + "\n"


def elsewhere(one: Benchmark) -> str:
    return f" Figures of earlier measurements are in `{one.seen}`." if one.seen else ""


def told(record: Record) -> str:
    """When, where and how it was measured, and its goals."""
    machine = record.machine
    torch = f", torch {machine['torch']}" if machine.get("torch") else ""
    transformers = f", transformers {machine['transformers']}" if machine.get("transformers") else ""
    lines = [
        f"`{record.command}`, {day(record)}, commit {record.revision}; {machine['cpu']}, {machine['cores']} cores,"
        f" {machine['memory_gib']} GiB, Linux {machine['kernel']}, Python {machine['python']}{torch}{transformers};"
        f" load {record.load[0]:g} before and {record.load[1]:g} after, the benchmark's own included.",
        "",
        *(f"- goal: {words}: {WORDS[met]}" for words, met in record.goals),
    ]
    return "\n".join(lines).rstrip()


def day(record: Record) -> str:
    """`2026-11-23 20:15`."""
    return record.date[:16].replace("T", " ")


def markdown(text: str) -> str:
    """What a benchmark printed: its tables as they are, all else word for word, but goals, which stand above."""
    parts = []
    told = [line for line in text.strip().splitlines() if not line.startswith("goal: ")]
    for is_table, lines in groupby(told, key=lambda line: line.startswith("|")):
        block = "\n".join(lines).strip("\n")
        if block.strip():
            parts.append(block if is_table else fenced(block))
    return "\n\n".join(parts)


def fenced(text: str) -> str:
    """Word for word, whatever it holds."""
    return f"~~~text\n{text.replace('~~~', '~ ~ ~')}\n~~~"
