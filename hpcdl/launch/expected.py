"""When a job would start, by `sbatch --test-only` of the very script that would be submitted. It submits nothing."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from hpcdl.launch import control
from hpcdl.runs import words
from hpcdl.runs.scheduler import Runner, one_line, run_command

LIMIT_S = 10.0
"""A controller with a long queue takes seconds to try a job."""
_STARTS = re.compile(r"\bto start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)")
"""22.05: `sbatch: Job 7 to start at 2026-01-31T12:00:00 using 4 processors on nodes c[1-2] in partition debug`; before
20.11 `… processors on c[1-2]`; of several clusters `… at TIME on cluster NAME using …`."""
_ON = re.compile(r"\bprocessors on (?:nodes )?(\S+)")
_SOON_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What Slurm says of a job that was not submitted."""

    time: str | None = None
    """UTC, ISO 8601; None: it doesn't say."""
    said: str = ""
    """In words: when and where, or why it can't start at all."""


def start(text: str, *, runner: Runner = run_command, now: Callable[[], datetime] | None = None) -> Expected:
    """Asks Slurm.

    Args:
        text: the script.
        runner: what runs a command; tests give their own.
        now: the time; tests give their own.

    Returns:
        Both fields empty where there is no Slurm.
    """
    if shutil.which("sbatch") is None:
        return Expected()
    unset = [word for name in control.job_variables(os.environ) for word in ("-u", name)]
    command = [*(["env", *unset] if unset else []), "sbatch", "--test-only"]
    done = runner(command, text, LIMIT_S)
    said = done.stderr + done.stdout
    found = _STARTS.search(said)
    if found is None or done.returncode != 0:
        return Expected(
            said=f"unknown: {_complaint(said) or f'sbatch --test-only ended with {done.returncode}'}"
        )
    at = datetime.fromisoformat(found[1]).replace(tzinfo=UTC)  # run_command asks in UTC
    wait_s = (at - (now() if now else datetime.now(UTC))).total_seconds()
    nodes = _ON.search(said)
    where = f" on {nodes[1]}" if nodes else ""
    later = f"in {words.age(wait_s)}, {words.local(at.isoformat())}"
    when = "at once" if wait_s < _SOON_S else later
    return Expected(
        time=at.isoformat(timespec="seconds"), said=f"{when}{where}, Slurm says (sbatch --test-only)"
    )


def _complaint(said: str) -> str:
    """Slurm's own words: `allocation failure: Requested node configuration is not available`."""
    lines = (line.removeprefix("sbatch: ").removeprefix("error: ") for line in said.splitlines())
    return one_line(lines)
