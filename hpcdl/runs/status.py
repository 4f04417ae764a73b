"""`hpcdl status`: a table of runs, or all that is known of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from hpcdl.runs import failure, foretold, words
from hpcdl.runs.files import last_line
from hpcdl.runs.judge import clock
from hpcdl.runs.reconcile import View
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir

if TYPE_CHECKING:
    from rich.console import Console

EVENTS_SHOWN = 8
LEAKS_SHOWN = 3
RULE_WIDTH = 80
COLUMNS = ("run", "name", "state", "step", "loss", "tok/s", "job", "nodes", "age")
RIGHT = frozenset({"step", "loss", "tok/s", "nodes", "age"})
NAME_LEAST = 8
"""Characters of a name that are shown at least, however narrow the terminal."""


def as_json(view: View) -> dict[str, Any]:
    """One run, under the names that scripts rely on."""
    state = view.state
    return {
        "run_id": state.run_id,
        "name": state.name,
        "state": state.state,
        "reason": state.reason,
        "job_id": state.job_id,
        "run_dir": str(view.run.path),
        "nodes": state.nodes,
        "world_size": state.world_size,
        "step": view.run.step(),
        "max_steps": state.max_steps,
        "restarts": state.restarts,
        "requeues": state.requeues,
        "exit_code": state.exit_code,
        "created": state.created,
        "started": state.started,
        "ended": state.ended,
    }


def summary(views: Sequence[View]) -> str:
    """How many runs are in which state: `2 RUNNING · 1 FAILED`."""
    counts: Counter[str] = Counter(view.state.state for view in views)
    return " · ".join(f"{counts[state]} {state}" for state in words.STYLES if counts[state])


def print_table(console: Console, views: Sequence[View], total: Sequence[View]) -> None:
    """The runs that are shown, and under them how many there are in all.

    Args:
        console: where to.
        views: the rows.
        total: all runs that were found.
    """
    from rich.table import Table
    from rich.text import Text

    gap = 1 if console.width < 100 else 2
    rows = [_row(view) for view in views]
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    name = COLUMNS.index("name")
    # The name gives way: a cut id, job or state would be of no use.
    others = sum(widths) - widths[name] + gap * (len(COLUMNS) - 1)
    widths[name] = min(widths[name], max(NAME_LEAST, console.width - others))
    grid = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold", show_edge=False)
    for column, width in zip(COLUMNS, widths, strict=True):
        justify: Literal["right", "left"] = "right" if column in RIGHT else "left"
        grid.add_column(
            column, justify=justify, no_wrap=True, overflow="ellipsis", min_width=width, max_width=width
        )
    for view, row in zip(views, rows, strict=True):
        style = words.STYLES[view.state.state]
        grid.add_row(*(Text(cell, style=style if i == 2 else "") for i, cell in enumerate(row)))
    console.print(grid)
    hidden = len(total) - len(views)
    more = f"; {hidden} older: --all or -n shows them" if hidden > 0 else ""
    console.print(Text(f"{summary(total)}{more}", style="dim"))
    for reason in _why_unknown(views):
        console.print(Text(reason, style="yellow"), soft_wrap=True)


def _row(view: View) -> tuple[str, ...]:
    state = view.state
    job = state.job_id or ("local" if state.kind == "local" else "-")
    age = words.age(words.since(state.created))
    return (state.run_id, state.name, state.state, *_progress(view), job, str(state.nodes), age)


def _why_unknown(views: Sequence[View]) -> list[str]:
    """Each thing that kept states from being verified, once, and since when it does."""
    since = [f"unknown since {clock(view.since)}: " if view.since else "" for view in views]
    return sorted(
        {f"{s or 'not checked: '}{v.unchecked}" for s, v in zip(since, views, strict=True) if v.unchecked}
    )


def _progress(view: View) -> tuple[str, str, str]:
    """Step, loss and speed as the table's cells."""
    last = last_line(view.run.metrics_file, having="loss")
    total = view.state.max_steps
    if last is None:
        return f"0/{total}", "-", "-"
    speed = last.get("tokens_per_s")
    return f"{last['step']}/{total}", words.number(last["loss"], 3), words.short(speed) if speed else "-"


def print_detail(console: Console, view: View) -> None:
    """All that is known of one run, and what to type next."""
    from rich.text import Text

    state = view.state
    title = Text.assemble((state.name, "bold"), "  ", state.run_id, "  ")
    title.append(state.state, style=words.STYLES[state.state])
    console.print(title)
    _print_fields(console, _fields(view))
    # In one piece, however long: it is there to be copied.
    console.print(Text.assemble(("directory  ", "dim"), str(view.run.path)), soft_wrap=True)
    events = view.run.events()
    if events:
        _heading(console, "events")
        for line in event_lines(events[-EVENTS_SHOWN:]):
            console.print(Text(line), no_wrap=True, overflow="ellipsis")
    traceback = traceback_of(view.run, state)
    if traceback:
        _heading(console, "traceback", style="red")
        console.print(Text(traceback.rstrip()), soft_wrap=True)
    _heading(console, "next")
    for command, meaning in next_commands(view):
        console.print(Text.assemble(f"{command}  ", (f"# {meaning}", "dim")), soft_wrap=True)


def _heading(console: Console, text: str, style: str = "dim") -> None:
    from rich.rule import Rule

    console.print(Rule(text, align="left", style=style), width=min(console.width, RULE_WIDTH))


def _print_fields(console: Console, fields: Sequence[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:  # whoever reads a file or a pipe wants whole lines, without padding
        for label, text in fields:
            console.print(f"{label:<9}  {text}", markup=False, soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, text in fields:
        grid.add_row(Text(f"{label:<9}", style="dim"), Text(text, overflow="fold"))
    console.print(grid)


def _fields(view: View) -> list[tuple[str, str]]:
    state, run = view.state, view.run
    hosts = f" ({', '.join(state.node_list)})" if state.node_list else ""
    exit_code = f", exit code {state.exit_code}" if state.exit_code is not None else ""
    fields = [
        ("reason", state.reason),
        ("unchecked", view.unchecked if state.state != "UNKNOWN" else ""),
        ("job", f"{state.job_id or '-'} ({state.kind}{exit_code})"),
        ("nodes", f"{state.nodes}{hosts}, {state.world_size} process{'es' if state.world_size != 1 else ''}"),
        ("progress", _last_metrics(view)),
        ("planned", foretold.in_words(run, state)),
        ("slow", straggler(run.events())),
        ("held-out", _evaluations(run)),
        ("times", _times(state)),
        ("tries", _tries(state)),
        *(("leak", text) for text in _leaks(run)),
    ]
    return [(label, text) for label, text in fields if text]


def _leaks(run: RunDir) -> list[str]:
    """What leaks, the last word on each process of the last try."""
    found = [event for event in run.events() if event.get("event") == "leak"]
    last = {
        (event.get("node"), str(event.get("process")), event.get("memory")): str(event.get("message", ""))
        for event in found
        if event.get("try") == found[-1].get("try")
    }
    return list(last.values())[-LEAKS_SHOWN:]


def _last_metrics(view: View) -> str:
    last = last_line(view.run.metrics_file, having="loss")
    if last is None:
        return f"no step of {view.state.max_steps} yet"
    parts = [f"step {last['step']}/{view.state.max_steps}", f"loss {words.number(last['loss'])}"]
    if last.get("tokens_per_s"):
        parts.append(f"{last['tokens_per_s']:,.0f} tokens/s")
    if last.get("mfu"):
        parts.append(f"MFU {100 * last['mfu']:.1f} %")
    if last.get("peak_memory_bytes"):
        parts.append(f"peak {words.size(last['peak_memory_bytes'])}")
    return ", ".join(parts)


def straggler(events: Sequence[dict[str, Any]]) -> str:
    """Whom the others of this try wait for, in words; empty where nobody is slower than they are."""
    found: dict[str, Any] = {}
    for event in events:
        if event.get("event") == "straggler":
            found = event
        elif event.get("event") in ("straggler_over", *failure.BEGINNINGS):
            found = {}
    if not found:
        return ""
    who = "all ranks of" if found.get("ranks") else f"rank {found.get('rank')},"
    return (
        f"{who} node {found.get('node')}: {words.number(found.get('slower_by'), 2)} times the others' own time since"
        f" step {found.get('since_step')}: {found.get('cause')} ({found.get('why')})"
    )


def _evaluations(run: RunDir) -> str:
    metrics = run.metrics()
    for what in ("perplexity", "return", "reward"):
        lines = [m for m in metrics if m.get(f"eval_{what}") is not None]
        if lines:
            chosen = [lines[0]] if len(lines) == 1 else [lines[0], lines[-1]]
            shown = (f"{words.number(m[f'eval_{what}'], 3)} (step {m['step']})" for m in chosen)
            return f"{what} " + " → ".join(shown)
    return ""


def _times(state: RunState) -> str:
    parts = [f"launched {words.local(state.created)}"]
    if state.started:
        parts.append(f"started {words.local(state.started)}")
    if state.ended:
        parts.append(f"ended {words.local(state.ended)}")
        if state.started:
            parts.append(f"took {words.duration(words.between(state.started, state.ended))}")
    elif state.started and state.state == "RUNNING":
        parts.append(f"for {words.duration(words.since(state.started))}")
    return ", ".join(parts)


def _tries(state: RunState) -> str:
    if not (state.attempt or state.restarts or state.requeues):
        return ""
    return f"launch {state.attempt + 1}, {state.restarts} restarts in place, {state.requeues} requeues"


def event_lines(events: Sequence[dict[str, Any]]) -> list[str]:
    """Each event on a line: when, what, and its details."""
    lines = []
    for event in events:
        hidden = ("time", "event", "traceback", "found_by", foretold.KEY)
        details = [
            f"{k}={_plain(v)}" for k, v in event.items() if k not in hidden and v not in (None, "", [])
        ]
        if event.get("event") == "leak":
            details = [str(event.get("message", ""))]
        time = words.local(str(event.get("time", "")))
        lines.append(f"{time}  {event.get('event', '?')!s:<11} {' '.join(details)}".rstrip())
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = str(value)
    return repr(text) if " " in text else text


def traceback_of(run: RunDir, state: RunState) -> str:
    """The failed run's traceback, as its agent or a poll recorded it, else from the ranks' own files."""
    if state.state in ACTIVE or state.state == "COMPLETED":
        return ""
    recorded = [e for e in run.events() if e.get("event") in ("failed", "started")]
    if recorded and recorded[-1].get("traceback"):
        return str(recorded[-1]["traceback"])
    cause = failure.root_cause(run)
    return cause.traceback if cause else ""


def next_commands(view: View) -> list[tuple[str, str]]:
    """What one may want to type, given how the run stands."""
    state, run = view.state, view.run
    name = state.run_id
    if state.state in ACTIVE:
        commands = [(f"hpcdl cancel {name}", "save a checkpoint and stop")]
        if state.state != "PENDING" or failure.log_files(run):
            commands.insert(0, (f"hpcdl logs -f {name}", "what the ranks print"))
        return [(f"hpcdl follow {name}", "progress, until it is over"), *commands]
    if state.state == "COMPLETED":
        return [
            (f"hpcdl result {name}", "loss and perplexity before and after"),
            (f"hpcdl logs {name}", "the log"),
        ]
    commands = [(f"hpcdl logs {name}", "the log of every rank")] if failure.log_files(run) else []
    if commands and failure.root_cause(run) is not None:
        commands.insert(0, (f"hpcdl logs {name} --error", "the first error, and what led to it"))
    output = failure.own_output(run, state)
    if not commands and output is not None:
        commands = [(f"hpcdl logs {name}", "the job's own output")]
    again = (
        "resumes it from its last checkpoint" if any(run.checkpoints.glob("step-*")) else "starts it again"
    )
    return [*commands, ("hpcdl launch …", f"the same command as before {again}")]
