"""Run directories: where they are, what is in them, how their state is read and changed.

    <runs_dir>/<name>/<run_id>/       one run (its files: see docs/architecture.md)
    <runs_dir>/.submissions/<token>/  one sbatch: job.sh, runs.txt (a run directory a line), submission.json
    <runs_dir>/latest                 link to the run launched last
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpcdl.runs.files import append_line, last_line, locked, read_lines, write_json
from hpcdl.runs.state import RunState

SUBMISSIONS = ".submissions"


def now() -> str:
    """This moment in UTC, to the millisecond, as it stands in all files of a run."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class RunDir:
    """One run's directory. Holds no state of its own: each call reads the files."""

    path: Path

    @property
    def spec_file(self) -> Path:
        """The resolved experiment, the one thing that crosses to the compute nodes."""
        return self.path / "spec.yaml"

    @property
    def job_file(self) -> Path:
        """Exactly what was submitted."""
        return self.path / "job.sh"

    @property
    def state_file(self) -> Path:
        """The state, replaced atomically."""
        return self.path / "state.json"

    @property
    def events_file(self) -> Path:
        """What happened, a line each."""
        return self.path / "events.jsonl"

    @property
    def metrics_file(self) -> Path:
        """A line a logged step, and a line an evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """A file a node and a try: `<node>-try<attempt>.<requeue>.log`."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Folders `step-00000100`."""
        return self.path / "checkpoints"

    @property
    def errors(self) -> Path:
        """What each failing rank said: `try<attempt>.<requeue>-restart<n>-rank<r>.json`."""
        return self.path / "errors"

    @property
    def outcome_file(self) -> Path:
        """Written by rank 0 as its last act: how the loop ended (`finished`, or `stopped` and why)."""
        return self.path / "outcome.json"

    @property
    def result_file(self) -> Path:
        """Loss and perplexity before and after, as JSON; beside it card.md and loss.png."""
        return self.path / "result.json"

    @property
    def stop_file(self) -> Path:
        """Its presence asks the workers to save and stop; its first word says why (`cancel`)."""
        return self.path / "STOP"

    def read_state(self) -> RunState:
        """The state as the file has it, the job id of a pending job added from its submission.

        Raises:
            FileNotFoundError: no run was ever launched here.
        """
        plain = json.loads(self.state_file.read_text(encoding="utf-8"))
        plain["node_list"] = tuple(plain.get("node_list", ()))
        state = RunState(**plain)
        if state.job_id is None and state.submission is not None:
            job_id = read_submission(self.runs_dir, state.submission).get("job_id")
            if job_id is not None:
                state = dataclasses.replace(state, job_id=f"{job_id}_{state.array_index}")
        return state

    def write_state(self, state: RunState, *, durable: bool = True) -> None:
        """Replaces the state."""
        write_json(self.state_file, dataclasses.asdict(state), durable=durable)

    def update(self, expect: RunState | None = None, **changes: Any) -> RunState:
        """Changes fields of the state under the run's lock.

        Args:
            expect: only change the state if it still is this one (as `read_state` gave it): someone who
                decided on old knowledge must not overwrite what has happened since.
            **changes: fields and their new values.

        Returns:
            The state that stands in the file afterwards.
        """
        with locked(self.path / ".lock"):
            state = self.read_state()
            if expect is not None and state != expect:
                return state
            changed = dataclasses.replace(state, **changes)
            self.write_state(changed)
        return changed

    def event(self, kind: str, **details: Any) -> None:
        """Appends to events.jsonl: `{"time": …, "event": kind, …details}`."""
        append_line(self.events_file, {"time": now(), "event": kind, **details})

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        return read_lines(self.events_file)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, oldest first."""
        return read_lines(self.metrics_file)

    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        last = last_line(self.metrics_file, having="loss")
        return int(last["step"]) if last else 0

    @property
    def runs_dir(self) -> Path:
        """The folder of all runs that this one lies in."""
        return self.path.parent.parent


def read_submission(runs_dir: Path, token: str) -> dict[str, Any]:
    """The record of one sbatch: `{token, job_id, kind, created, …}`; empty if it is gone."""
    try:
        record = json.loads((runs_dir / SUBMISSIONS / token / "submission.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return dict(record)


def all_runs(runs_dir: Path) -> Iterator[RunDir]:
    """Every run below `runs_dir`, in no order."""
    try:
        names = [entry for entry in os.scandir(runs_dir) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for name in names:
        if name.name.startswith("."):
            continue
        for entry in os.scandir(name.path):
            if entry.is_dir(follow_symlinks=False) and Path(entry.path, "state.json").exists():
                yield RunDir(Path(entry.path))
