"""Paired timing: every contender runs once a round, so that what else the machine does hits all of them."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A command that is timed from its start to its end."""

    name: str
    argv: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    note: str = ""
    """What the time covers, where that isn't what it covers for the others."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. CPU time is steadier than wall time on a machine that does other work too."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over theirs, taken within each round."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    n: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


class ContenderError(Exception):
    """A command failed; its time would mean nothing."""


def run_once(contender: Contender) -> Sample:
    """Runs the command; output is read and dropped, stderr kept for the error.

    Raises:
        ContenderError: the command's exit code was not 0.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        contender.argv,
        cwd=contender.cwd,
        env={**os.environ, **contender.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    # wait4, not Popen.wait: it gives the CPU time of this child and of those that the child waited for.
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        tail = output.decode(errors="replace").strip()[-800:]
        raise ContenderError(f"exit code {process.returncode}: {tail}")
    return Sample(wall_s, usage.ru_utime + usage.ru_stime)


def warm_up(contenders: Sequence[Contender]) -> tuple[list[Contender], dict[str, str]]:
    """Runs each once, uncounted (byte code gets written, files get cached).

    Returns:
        Those that work, and for each of the others why it doesn't.
    """
    working, broken = [], {}
    for contender in contenders:
        try:
            run_once(contender)
        except (ContenderError, OSError) as error:
            broken[contender.name] = str(error)
        else:
            working.append(contender)
    return working, broken


def interleave(contenders: Sequence[Contender], rounds: int) -> dict[str, list[Sample]]:
    """Times every contender once a round, each round starting with another one."""
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        start = turn % len(contenders)
        for contender in [*contenders[start:], *contenders[:start]]:
            samples[contender.name].append(run_once(contender))
    return samples


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The median and the quartiles of ours / theirs over the rounds."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0], 1)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(statistics.median(ratios), low, high, len(ratios))


def interval(ours: Sequence[float], theirs: Sequence[float], *, resamples: int = 2000) -> Ratio:
    """The median of ours / theirs over the rounds, and where it lies in 95 % of as many rounds drawn anew.

    Source: Efron, "Bootstrap Methods", 1979; the percentile interval.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]
    return Ratio(statistics.median(ratios), low, high, len(ratios))


def mark(low: float, high: float) -> str:
    """Who is quicker, by the spread of ours / theirs."""
    return "**hpcdl loses**" if low > 1 else "hpcdl wins" if high < 1 else "even"


def machine() -> dict[str, Any]:
    """What stands beside every figure."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up as plain text too; the first column is text, the others are figures."""
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [table[0], rule, *table[1:]]
    return "\n".join("| " + " | ".join(_pad(row, widths)) + " |" for row in lines)


def _pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        row[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
    ]
