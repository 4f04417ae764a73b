"""What stands in a comparison's cells: figures with their units, by their names, and runs in a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcdl.runs import words
from hpcdl.runs.compare_groups import Group
from hpcdl.runs.compare_row import Row

SHORT = {"dp_replicate": "rep", "dp_shard": "shard", "cp": "cp", "tp": "tp", "pp": "pp"}
BEST, FRONT = "*", "◆"
"""The marks of the best figure, and of runs on the front."""
HEADERS = {
    "tokens_per_s": "tokens/s",
    "efficiency": "eff.",
    "step_s": "step",
    "peak_memory_bytes": "memory",
    "comm_share": "comm",
    "comm_bytes": "comm/step",
    "eval_loss": "held-out",
}
"""Figures under another name than their own."""
SHARES = frozenset({"efficiency", "comm_share", "mfu"})


def unfinished(row: Row) -> str:
    """Why a run is neither done nor under way, and how far it and its memory had come; empty if it is."""
    if row.state in ("COMPLETED", "RUNNING", "PENDING"):
        return ""
    name = f"{row.strategy} {row.nodes}×{row.processes_per_node} {row.run_id}"
    reached = ""
    if row.state == "OUT_OF_MEMORY" and row.peak_memory_bytes:
        reached = f" at {words.size(row.peak_memory_bytes)} a rank"
    elif row.state == "OUT_OF_MEMORY" and row.node_memory_bytes:
        reached = f" at {words.size(row.node_memory_bytes)} a node or more"
    why = f": {row.reason}" if row.reason else ""
    return f"{name}: {row.state}{reached} after {row.step} of {row.max_steps} steps{why}"


def state(row: Row) -> str:
    """The state, and how far a run has come that goes on."""
    return f"{row.state} {row.step}/{row.max_steps}" if row.state == "RUNNING" else row.state


def degrees(row: Row) -> str:
    """`rep2 tp2`; a dash for a single process."""
    return " ".join(f"{SHORT[name]}{degree}" for name, degree in row.degrees.items()) or "-"


def efficiency(row: Row, shared: set[str | None]) -> str:
    """In per cent; `base` for the run that others are compared with, a dash for one that nobody is."""
    if row.efficiency is None or row.baseline == row.run_id:
        return "base" if row.run_id in shared else "-"
    return percent(row.efficiency)


def short_ids(ids: Sequence[str], least: int = 5) -> dict[str, str]:
    """The beginning of each run id that tells it from the others: every command takes it."""
    for length in range(least, max(map(len, ids), default=least) + 1):
        if len({one[:length] for one in ids}) == len(set(ids)):
            return {one: one[:length] for one in ids}
    return {one: one for one in ids}


def header(name: str) -> str:
    """A figure's name in a table."""
    return HEADERS.get(name, name)


def figure(name: str, value: float, *, precise: bool = False) -> str:
    """A figure with its unit, by its name.

    Args:
        name: of the figure.
        value: in the name's unit.
        precise: where seeds are compared: with a digit more.
    """
    last = name.rpartition(".")[2]
    if last.endswith("per_s"):
        return f"{value:,.0f}" if precise and abs(value) < 100_000 else words.short(value)
    if last.endswith("_bytes") or last == "bytes":
        return words.size(value)
    if last in SHARES or last.endswith("_share"):
        return f"{100 * value:.1f} %" if precise else percent(value)
    if last.endswith("_s"):
        return seconds(value)
    if last.endswith(("loss", "perplexity", "_before", "_after")):
        return words.number(value, 4 if precise else 3)
    return f"{value:.5g}" if abs(value) < 1e5 or value != int(value) else words.short(value)


def seconds(value: float) -> str:
    """`87 ms`, `1.23 s`."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def percent(share: float) -> str:
    """`87 %`."""
    return f"{100 * share:.0f} %"


def probability(p: float) -> str:
    """`0.031`, `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def value(of_key: Any) -> str:
    """A config's value, cut where it is long."""
    if of_key is None:
        return "-"
    text = f"{of_key:g}" if isinstance(of_key, float) else str(of_key)
    text = text.lower() if isinstance(of_key, bool) else text
    return text if len(text) <= 20 else text[:19] + "…"


def some(group: Group, ids: dict[str, str]) -> str:
    """A group by its first run."""
    first = ids[group.row.run_id]
    return first if len(group.rows) == 1 else f"{first} +{len(group.rows) - 1}"
