"""`hpcdl result`: what a finished run has achieved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import RunFailedError, UsageError
from hpcdl.runs import memory, words
from hpcdl.runs.reconcile import View
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir

if TYPE_CHECKING:
    from rich.console import Console


MEASURED = (
    ("loss", "eval_loss"),
    ("perplexity", "eval_perplexity"),
    ("return", "eval_return"),
    ("reward", "eval_reward"),
)
"""What is measured before and after, in words, and its keys in result.json without `_before` and `_after`."""


def load(view: View) -> dict[str, Any]:
    """The content of result.json.

    Raises:
        UsageError: the run isn't over yet.
        RunFailedError: it is over, and left no result.
    """
    state = view.state
    try:
        record = json.loads(view.run.result_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = f" ({state.reason})" if state.reason else ""
        if state.state in ACTIVE:
            step = f"step {view.run.step()}/{state.max_steps}"
            raise UsageError(f"{state.run_id} has no result yet: {state.state}{why}, {step}") from None
        raise RunFailedError(f"{state.run_id} left no result: {state.state}{why}") from None
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{view.run.result_file}: can't be read ({error})") from error
    if not isinstance(record, dict):
        raise UsageError(f"{view.run.result_file}: not a result that hpcdl wrote")
    return record


def print_result(console: Console, view: View, record: dict[str, Any]) -> None:
    """The result as a small table, the sample text before and after, and where the files are."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text.assemble((view.state.name, "bold"), f"  {view.state.run_id}"))
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("held out", "before", "after", "change"):
        grid.add_column(name, justify="left" if name == "held out" else "right", no_wrap=True)
    for label, key in MEASURED:
        before, after = record.get(f"{key}_before"), record.get(f"{key}_after")
        if before is None and after is None:
            continue
        grid.add_row(label, words.number(before), words.number(after), change(before, after))
    console.print(grid)
    for line in _facts(record):
        console.print(Text(line), soft_wrap=True)
    _print_memory(console, view.run)
    _print_sample(console, record.get("sample") or {})
    for label, path in files(view.run, record):
        console.print(Text.assemble((f"{label:<9}", "dim"), str(path)), soft_wrap=True)


def change(before: float | None, after: float | None) -> str:
    """From one number to another, in per cent."""
    if not before or after is None:
        return "-"
    return f"{100 * (after - before) / before:+.1f} %"


def files(run: RunDir, record: dict[str, Any]) -> list[tuple[str, Path]]:
    """The files that are there to be looked at."""
    adapter = record.get("adapter")
    candidates = [
        ("card", run.path / "card.md"),
        ("plot", run.path / "loss.png"),
        ("plot", run.path / "reward.png"),
    ]
    if adapter:
        candidates.append(("adapter", run.path / str(adapter)))
    return [(label, path) for label, path in candidates if path.exists()]


def _facts(record: dict[str, Any]) -> list[str]:
    speed, memory, mfu = (record.get(k) for k in ("tokens_per_s", "peak_memory_bytes", "mfu"))
    done = [f"{record['steps']} steps"] if "steps" in record else []  # eval and export train none
    if record.get("tokens"):
        done.append(f"{record['tokens']:,} tokens")
    if record.get("env_steps"):
        done.append(f"{record['env_steps']:,} steps of the environment")
    if record.get("train_s"):
        done.append(f"in {words.duration(record['train_s'])}")
    how = []
    if speed:
        how.append(f"{speed:,.0f} tokens/s")
    if record.get("env_steps_per_s"):
        how.append(f"{record['env_steps_per_s']:,.0f} of them a second")
    if mfu:
        how.append(f"MFU {100 * mfu:.1f} %")
    if memory:
        how.append(f"peak memory {words.size(memory)} a process")
    size, nodes = record.get("world_size"), record.get("nodes")
    if size and nodes:
        where = f"{nodes} node{'s' if nodes != 1 else ''}"
        how.append(f"{size} process{'es' if size != 1 else ''} on {where}")
    trained, total = record.get("trainable_parameters"), record.get("parameters")
    lines = [", ".join(done), ", ".join(how)]
    if trained and total:
        lines.append(f"{trained:,} of {total:,} parameters trained ({100 * trained / total:.2f} %)")
    return [line for line in lines if line]


def _print_memory(console: Console, run: RunDir) -> None:
    """Where the bytes went, and where they were planned to go; nothing where that wasn't measured."""
    from rich.table import Table
    from rich.text import Text

    found = memory.load(run.path)
    if found is None:
        return
    console.print()
    (title,) = memory.notes(found)
    console.print(Text(title, "bold"), soft_wrap=True)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column("", no_wrap=True)
    for name in ("planned", "measured", "plan is off by"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in memory.rows(found):
        grid.add_row(*row)
    console.print(grid)
    for line in memory.remarks(found):
        console.print(Text(line, "dim"), soft_wrap=True)


def _print_sample(console: Console, sample: dict[str, Any]) -> None:
    from rich.text import Text

    if not sample.get("prompt"):
        return
    console.print()
    for label in ("before", "after"):
        text = Text.assemble((f"{label:<9}", "dim"), (str(sample["prompt"]), "bold"))
        text.append(_continuation(str(sample["prompt"]), str(sample.get(label, ""))))
        console.print(text)
    console.print()


def _continuation(prompt: str, text: str) -> str:
    """What the model wrote, on one line, without the prompt it was given."""
    return text.removeprefix(prompt).replace("\n", "⏎ ")
