"""Jobs that wait for a job's success, when its run goes on in another job: they are told to wait for that one.

Slurm knows nothing of runs: without this, the end of the old job would cancel them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from hpcdl.launch import control

_STATE = re.compile(r"\([a-z ]+\)")
"""What squeue adds to each dependency: `(unfulfilled)`, `(failed)`."""


def move(old: str, new: str, say: Callable[[str], None]) -> None:
    """Lets this user's pending jobs that wait for the job `old` wait for `new` in its place.

    Args:
        old: `123_4`.
        new: the job that goes on.
        say: takes a line for each job, also where Slurm refuses.
    """
    done = control.run(["squeue", "-h", "-a", "-t", "pending", "-u", str(os.getuid()), "-o", "%F|%E"])
    if done.returncode != 0:
        say(f"jobs that wait for {old} may not have been told to wait for {new}: {control.said(done)}")
        return
    waiting = dict(line.partition("|")[::2] for line in done.stdout.splitlines())
    for job_id, text in waiting.items():
        changed = _changed(text, old, new)
        if changed is None:
            continue
        done = control.run(["scontrol", "update", f"jobid={job_id}", f"dependency={changed}"])
        refused = f" could not be told: {control.said(done)}" if done.returncode else ""
        say(f"job {job_id} waits for {new} in the place of {old}{refused}")


def _changed(text: str, old: str, new: str) -> str | None:
    """The dependency with the new job in it; None where the old one isn't, or another kind of wait is."""
    plain = _STATE.sub("", text.strip())
    changed = re.sub(rf"(afterok(?::[\d_*]+)*?:){re.escape(old)}(?![\d_])", rf"\g<1>{new}", plain)
    return changed if changed != plain else None
