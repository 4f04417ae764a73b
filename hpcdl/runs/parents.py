"""Runs that others wait for (`after=RUN`): written beside the submission that waits, read by whoever judges it.

Slurm knows jobs; what a run waits for is a run. Its job may have been requeued, or been followed by a job with
another id, so a dependent looks at the runs' own states too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcdl.runs.files import write_json
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir, read_submission

FILE = "after.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """What a submission waits for."""

    run: RunDir | None
    """None: a job of Slurm's that is no run of ours."""
    name: str
    """For people: `3f2a… (train)`, or `job 4711`."""
    job_id: str | None
    """Slurm's, as it was at the launch; None where the run is this machine's."""

    def state(self) -> RunState | None:
        """How the run stands; None where it is none of ours, or was deleted."""
        if self.run is None:
            return None
        try:
            return self.run.read_state()
        except FileNotFoundError:
            return None


def write(folder: Path, parents: Sequence[Parent]) -> None:
    """Puts what a submission waits for into its folder."""
    plain = [
        {"run_dir": str(p.run.path) if p.run else None, "name": p.name, "job_id": p.job_id} for p in parents
    ]
    write_json(folder / FILE, {"parents": plain})


def of_submission(runs_dir: Path, token: str | None) -> tuple[Parent, ...]:
    """What a submission waits for; nothing where it has no such file."""
    if token is None:
        return ()
    record = read_submission(runs_dir, token, FILE)
    return tuple(
        Parent(
            run=RunDir(Path(plain["run_dir"])) if plain["run_dir"] else None,
            name=plain["name"],
            job_id=plain["job_id"],
        )
        for plain in record.get("parents", ())
    )


def failed(parents: Sequence[Parent]) -> str:
    """Why the wait is in vain, with the name of the run that will not succeed; empty while it may."""
    for parent in parents:
        state = parent.state()
        if parent.run is not None and state is None:
            return f"{parent.name}, which it waited for, was deleted"
        if state is not None and state.state not in ACTIVE and state.state != "COMPLETED":
            why = f": {state.reason}" if state.reason else ""
            return f"{parent.name}, which it waited for, is {state.state}{why}"
    return ""


def unfinished(parents: Sequence[Parent]) -> tuple[Parent, ...]:
    """Those of our runs that have not succeeded, as their own states have it."""
    return tuple(p for p in parents if p.run and ((state := p.state()) is None or state.state != "COMPLETED"))


def waits_for(parents: Sequence[Parent]) -> str:
    """`waits for 3f2a… (train), RUNNING`: those that are not over yet."""
    said = []
    for parent in parents:
        state = parent.state()
        if state is None or state.state in ACTIVE:
            said.append(f"{parent.name}{f', {state.state}' if state else ''}")
    return f"waits for {'; '.join(said)}" if said else ""
