"""What a launch says: on a terminal a few lines and the next commands to type, for scripts a line a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcdl.errors import HpcdlError
from hpcdl.launch import backends, expected, planning
from hpcdl.launch.points import Batch, Planned, runs_folder
from hpcdl.launch.sweep import Asked, Refused
from hpcdl.launch.torchrun import preview
from hpcdl.spec import ClusterSpec, LaunchOptions
from hpcdl.spec.experiment import default_runs_dir

SHOWN = 20
"""Rows of a sweep's table."""
WORDS = {"new": "submitted", "resume": "resumed", "active": "already there", "done": "done before"}


def dry_run(batches: Sequence[Batch], notes: Sequence[str]) -> None:
    """The very text that would be submitted, and the torchrun command that it leads to."""
    for note in notes:
        print(f"# {note}", file=sys.stderr)
    for number, batch in enumerate(batches, start=1):
        if len(batches) > 1:
            print(f"# ---- submission {number} of {len(batches)}: {len(batch.runs)} run(s)")
        text = backends.get(batch.request.cluster.kind).render(batch.request)
        print(text, end="" if text.endswith("\n") else "\n")
        print(f"\n# torchrun: {preview(batch.request.cluster, batch.request.python)}")
        if plan := planning.line(batch.runs):
            start = expected.start(text).said if batch.request.cluster.kind == "slurm" else ""
            print(f"# plan: {plan}{start and f', starts {start}'}")


def parsable(planned: Sequence[Planned], refused: Sequence[Refused] = ()) -> None:
    """run_id, job_id, run_dir, tab-separated, a line a run; and nothing else on standard output."""
    for item in planned:
        print(f"{item.run.path.name}\t{_job(item)}\t{item.run.path}", flush=True)
    for line in refused_lines(refused):
        print(line, file=sys.stderr)


def refused_lines(refused: Sequence[Refused]) -> list[str]:
    """Each point that was left out, and why: `refused: parallel.tp=3: parallel.tp = 3: does not divide …`."""
    return [f"refused: {item.label}: {_why(item)}" for item in refused]


def _why(item: Refused) -> str:
    """The first reason, and how many more there are."""
    more = len(item.faults) - 1
    return f"{item.reason}{f' (and {more} more)' if more else ''}"


def _job(item: Planned) -> str:
    """The scheduler's id; `-` where there is none, or the run waits for its turn on this machine."""
    try:
        return item.run.read_state().job_id or "-"
    except FileNotFoundError:
        return "-"


def launched(planned: Sequence[Planned], asked: Asked, sweep: str | None) -> None:
    """What happened to each run, which points were left out, and what one may want to type next."""
    if len(planned) == 1 and sweep is None:
        _one(planned[0], asked.options)
    else:
        _many(planned, asked, sweep or "")


def _one(item: Planned, options: LaunchOptions) -> None:
    state = item.run.read_state()
    first = {
        "new": "submitted",
        "resume": f"taken up again after it was {item.view.state.state}" if item.view else "",
        "active": f"already {state.state}: nothing was submitted",
        "done": "has COMPLETED before: nothing was submitted",
    }[item.action]
    if state.kind == "local" and item.action == "new":
        first = "started"
    print(f"run        {state.run_id}  {state.name}  ({first})")
    print(f"job        {_job(item)}  {_resources(item.spec.cluster)}")
    if plan := planning.line([item]):
        print(f"plan       {plan}")
    print(f"directory  {item.run.path}")
    for label, note in zip(("chosen", *[""] * len(item.notes)), item.notes, strict=False):
        print(f"{label:<10} {note.removeprefix('parallel=auto chose ')}")
    if item.action == "done":
        print_result(item)
        print("force=true makes a new run of the same experiment")
    elif state.kind != "local" or item.action == "active":
        _next(state.run_id, options)


def _resources(cluster: ClusterSpec) -> str:
    where = f"partition {cluster.partition}, " if cluster.partition else ""
    gpus = f", {cluster.gpus_per_node} GPUs a node" if cluster.gpus_per_node else ""
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    return f"{where}{nodes} × {cluster.processes_per_node} processes{gpus}"


def _next(name: str, options: LaunchOptions, *, compare: bool = False) -> None:
    other = runs_folder(options) != Path(default_runs_dir()).absolute()
    where = f" --runs-dir {shlex.quote(str(options.runs_dir))}" if other else ""
    print("next")
    for verb, what in (
        ("status", "how it stands"),
        ("compare", "its runs side by side") if compare else ("logs -f", "what its ranks print"),
        ("follow", "progress, until it is over"),
        ("cancel", "save a checkpoint and stop"),
    ):
        print(f"  hpcdl {verb} {name}{where}".ljust(45) + f"  {what}")


def _many(planned: Sequence[Planned], asked: Asked, sweep: str) -> None:
    options = asked.options
    counts = {words: sum(WORDS[item.action] == words for item in planned) for words in WORDS.values()}
    said = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    points = sum(len(item.labels) for item in planned)
    same = f" ({points} points; equal ones are one run)" if points != len(planned) else ""
    print(
        f"{f'sweep      {sweep}: ' * bool(sweep)}{len(planned)} run{'s' * (len(planned) != 1)}{same}: {said}"
    )
    if plan := planning.line(planned):
        print(f"plan       {plan}")
    print(f"directory  {runs_folder(options) / planned[0].spec.name}")
    for item in planned[:SHOWN]:
        print(
            f"  {item.run.path.name:<15} {_job(item):<12} {WORDS[item.action]:<13} {'; '.join(item.labels)}"
        )
        if item.notes:
            print(f"    {item.notes[0]}")
    if len(planned) > SHOWN:
        print(f"  … and {len(planned) - SHOWN} more: hpcdl status {sweep or '--all'}")
    _left_out(asked.refused, sweep)
    if sweep and any(item.spec.cluster.kind != "local" for item in planned):
        _next(sweep, options, compare=True)


def _left_out(refused: Sequence[Refused], sweep: str) -> None:
    """The points that can't be, each with its first reason."""
    if not refused:
        return
    print(
        f"refused    {len(refused)} point{'s' * (len(refused) != 1)} that can't be (strict=true refuses all)"
    )
    width = min(48, max(len(item.label) for item in refused[:SHOWN]))
    for item in refused[:SHOWN]:
        print(f"  {item.label:<{width}}  {_why(item)}")
    if len(refused) > SHOWN:
        print(f"  … and {len(refused) - SHOWN} more: hpcdl compare {sweep}")


def print_result(item: Planned) -> None:
    """What the run has achieved."""
    from hpcdl.runs import terminal
    from hpcdl.runs.reconcile import View
    from hpcdl.runs.result import load
    from hpcdl.runs.result import print_result as show

    view = View(run=item.run, state=item.run.read_state())
    try:
        record = load(view)
    except HpcdlError as error:
        print(f"result     {error}")
        return
    show(terminal.console(), view, record)
