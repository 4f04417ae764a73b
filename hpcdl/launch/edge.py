"""The stages of edge_chain: each a launch of its own, the next waiting for the one before (`after=`).

Stages: the source evaluated (conf/experiment/edge_source), pruned and distilled (edge_chain), exported (edge_export).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import UsageError
from hpcdl.runs import query
from hpcdl.runs.words import size
from hpcdl.spec.plain import load_yaml

if TYPE_CHECKING:
    from rich.console import Console

SOURCE, CHAIN, EXPORT = "edge_source", "edge_chain", "edge_export"


def launch(overrides: Sequence[str], runs_dir: str | None) -> tuple[int, str | None]:
    """Launches the stages; returns the exit code and the last run's directory.

    Args:
        overrides: for every stage.
        runs_dir: folder of all runs; None: as launch finds it.
    """
    common = [*overrides, *([f"runs_dir={runs_dir}"] if runs_dir else [])]
    before: tuple[str, str] | None = None
    for stage in (SOURCE, CHAIN, EXPORT):
        more = [] if before is None else [f"after={before[0]}"]
        if stage == EXPORT:
            assert before is not None
            more.append(f"task.run={before[1]}")
        command = [
            sys.executable,
            "-m",
            "hpcdl.launch",
            f"+experiment={stage}",
            *common,
            *more,
            "parsable=true",
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode, None
        run_id, job_id, folder = done.stdout.splitlines()[-1].split("\t")
        print(f"{stage:<12} {run_id}  job {job_id}  {folder}", flush=True)
        before = run_id, folder
    return 0, before[1] if before else None


def rows(given: str, runs_dir: str | None) -> list[dict[str, Any]]:
    """What each stage came to; of one that isn't done, its name and state only.

    Raises:
        UsageError: the run is none of edge_export.
    """
    last = query.find_one(given, query.runs_dir(runs_dir)).path
    task = load_yaml(last / "spec.yaml")["task"]
    if task["name"] != "export" or not task.get("run"):
        raise UsageError(f"{last} is no run of {EXPORT}: its task names no run to export")
    chain = Path(task["run"])
    sources = sorted(
        (chain.parent.parent / SOURCE).glob("*/result.json"), key=lambda path: path.stat().st_mtime
    )
    source = _result(sources[-1].parent) if sources else {}
    trained, made = _result(chain), _result(last)
    return [
        {
            "stage": "source, 16 bit", "bytes": made.get("source_bytes"),
            "perplexity": source.get("eval_perplexity_after"),
        },
        {"stage": "pruned", "perplexity": trained.get("eval_perplexity_before")},
        {"stage": "pruned, distilled", "perplexity": trained.get("eval_perplexity_after")},
        {
            "stage": "exported", "bytes": made.get("bytes"), "perplexity": made.get("eval_perplexity_after"),
            "peak_rss_bytes": made.get("export_peak_rss_bytes"), "tokens_per_s": made.get("tokens_per_s"),
        },
    ]  # fmt: skip


def _result(run: Path) -> dict[str, Any]:
    path = run / "result.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def show(out: Console, found: Sequence[dict[str, Any]], last: str) -> None:
    """The table; what is not known yet is a dash."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for title in ("size", "perplexity", "peak memory", "tokens/s"):
        table.add_column(title, justify="right")
    for row in found:
        sizes = [size(row[key]) if row.get(key) else "-" for key in ("bytes", "peak_rss_bytes")]
        numbers = [f"{row[key]:,.2f}" if row.get(key) else "-" for key in ("perplexity", "tokens_per_s")]
        table.add_row(row["stage"], sizes[0], numbers[0], sizes[1], numbers[1])
    out.print(table)
    if not found[-1].get("bytes"):
        out.print(f"not done yet: hpcdl edge-chain --table {last}", markup=False, soft_wrap=True)
