"""The job that goes on when this one has ended: the same script, waiting for this job's end, for this run alone.

A requeued job is held back by Slurm for two minutes, an idle cluster or not; a job that waits for another one's end
starts as soon as there are nodes. hpcdl.runs.chain tells how it takes the run over, and what is left behind by an
agent that is killed on the way.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcdl.errors import SchedulerError
from hpcdl.launch import control, lost
from hpcdl.launch.child import started_at
from hpcdl.launch.place import Place
from hpcdl.runs import chain, outside, private, submissions
from hpcdl.runs.files import write_atomic, write_json
from hpcdl.runs.patience import Patience
from hpcdl.runs.scheduler import COMMENT, Slurm
from hpcdl.runs.store import SUBMISSIONS, RunDir, now, read_submission

WAIT_S = 45.0
"""How long a Slurm that doesn't answer is waited for; then a requeue is asked for instead."""
_OWN = frozenset(
    [
        *("array", "a", "comment", "output", "o", "dependency", "d", "kill-on-invalid-dep"),
        *("hold", "H", "begin", "b"),
    ]
)
"""sbatch options that a successor has its own of, or none: it is not held, and not for tomorrow."""
_OPTION = re.compile(r"#SBATCH\s+--?([A-Za-z-]+)(?:[=\s]\s*(.*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Successor:
    """One submission, as hpcdl.launch.lost takes it."""

    token: str
    runs_dir: Path
    run_dirs: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.runs_dir / SUBMISSIONS / self.token


def obstacle(run: RunDir, place: Place, *, forced: bool) -> str:
    """Why there can't, or shouldn't, be a successor of this job; empty where nothing speaks against one.

    Args:
        run: the run.
        place: this job.
        forced: whether the user wants one wherever it can be.
    """
    script = run.runs_dir / SUBMISSIONS / place.token / "job.sh"
    if place.token.startswith("hand-") or not script.exists():
        return "the job was submitted by hand"
    if shutil.which("sbatch") is None and not outside.is_here():
        return "there is no sbatch on this node"
    if forced:
        return ""
    found = re.search(r"^#SBATCH --array=0-(\d+)%(\d+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    if found and int(found.group(2)) <= int(found.group(1)):
        return f"its array runs {found.group(2)} tasks at a time, which only holds for its own"
    assert place.job_id is not None
    try:
        other = control.waited_for(place.job_id)
    except SchedulerError as error:
        return f"whether another job waits for this one is not known ({error})"
    return f"job {other} waits for this one" if other else ""


def submit(run: RunDir, place: Place, say: Callable[[str], None]) -> str:
    """The id of the successor's job, without its task. Called again, it finds the same one.

    Raises:
        SchedulerError: Slurm has refused it, or does not answer.
        UsageError: its folder is somebody else's.
    """
    assert place.job_id is not None
    made = Successor(
        token=chain.token_after(place.token, place.index), runs_dir=run.runs_dir, run_dirs=(run.path,)
    )
    known = chain.Link(
        token=place.token, array_index=place.index, job_id=place.job_id, tries=place.requeue + 1
    )
    slurm = Slurm()
    waiting = _in_queue(made, slurm)
    _write(made, known, job_id=waiting)
    if waiting:
        return waiting
    waits = Patience(WAIT_S, say=say)
    script = made.folder / "job.sh"
    return lost.submit(made, lambda: control.submit(script), slurm=slurm, waits=waits)


def _in_queue(made: Successor, slurm: Slurm) -> str | None:
    """The successor that was submitted before this job was started again by Slurm, and still waits for its end."""
    job_id = read_submission(made.runs_dir, made.token).get("job_id")
    if job_id is None:
        ids, _ = slurm.find({made.token}) if made.folder.exists() else ({}, "")
        job_id = next(iter(sorted(ids.get(made.token, ()), key=int)), None)
    if job_id is None:
        return None
    job = slurm.ask([f"{job_id}_{chain.INDEX}"]).jobs.get(f"{job_id}_{chain.INDEX}")
    return str(job_id) if job is not None and job.waiting else None


def _write(made: Successor, known: chain.Link, *, job_id: str | None) -> None:
    """The submission's files; those of an earlier successor that came to nothing are replaced."""
    before = made.runs_dir / SUBMISSIONS / known.token
    text = script((before / "job.sh").read_text(encoding="utf-8"), before, made, after=known.job_id)
    made.folder.mkdir(parents=True, exist_ok=True)
    private.require_mine(made.folder)
    if job_id is None:
        for name in (*made.folder.glob("slurm-*.out"), made.folder / submissions.ASKED):
            name.unlink(missing_ok=True)
        write_atomic(made.folder / "job.sh", text)
    write_atomic(made.folder / "runs.txt", f"{made.run_dirs[0]}\n")
    record = {
        "token": made.token,
        "job_id": job_id,
        "kind": "slurm",
        "name": read_submission(made.runs_dir, known.token).get("name", ""),
        "created": now(),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "pid_started": started_at(os.getpid()),
        chain.KEY: known.plain(),
    }
    write_json(made.folder / "submission.json", record)


def script(text: str, before: Path, made: Successor, *, after: str) -> str:
    """The job's own script, changed to a successor's: another name, this run only, after this job's end.

    Args:
        text: the script that this job was submitted with.
        before: its submission's folder.
        made: the successor.
        after: the job to wait for.

    Raises:
        SchedulerError: the script is not one that hpcdl has written.
    """
    header, marker, body = text.partition("\n\n")
    runs_file = f"HPCDL_RUNS_FILE={shlex.quote(str(before / 'runs.txt'))}\n"
    if not marker or body.count(runs_file) != 1:
        raise SchedulerError(f"{before / 'job.sh'} is not as hpcdl wrote it")
    options = [_OPTION.fullmatch(line) for line in header.splitlines()]
    kept = [
        line
        for line, option in zip(header.splitlines(), options, strict=True)
        if option is None or option.group(1) not in _OWN
    ]
    own = {
        "comment": COMMENT + made.token,
        "array": f"{chain.INDEX}-{chain.INDEX}",
        "output": str(made.folder).replace("%", "%%") + "/slurm-%A_%a.out",
        "dependency": f"afterany:{after}",
    }
    lines = [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in own.items()]
    mine = f"HPCDL_RUNS_FILE={shlex.quote(str(made.folder / 'runs.txt'))}\n"
    return "\n".join([*kept, *lines]) + marker + body.replace(runs_file, mine)
