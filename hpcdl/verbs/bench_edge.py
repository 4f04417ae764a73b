"""`hpcdl bench-edge`."""

from __future__ import annotations

import argparse

from hpcdl.verbs._common import console, print_json

HELP = "speed and memory of an exported model on a few cores"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument("export", metavar="EXPORT", help="folder that hpcdl export wrote, or the file in it")
    parser.add_argument(
        "--threads", default="1,2", metavar="N,…", help="how many, each pinned to a core of its own (1,2)"
    )
    parser.add_argument(
        "--prompt-tokens", type=_count, default=128, metavar="N", help="tokens that are read (128)"
    )
    parser.add_argument("--tokens", type=_count, default=64, metavar="N", help="tokens that are written (64)")
    parser.add_argument(
        "--repeats", type=_count, default=3, metavar="N", help="after a warm-up; the medians count (3)"
    )
    parser.add_argument("--json", action="store_true", help="for scripts")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: at least 1")
    return number


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from rich.table import Table

    from hpcdl.launch import exporting
    from hpcdl.runs.words import size

    found = exporting.bench(
        options.export,
        options.threads,
        prompt=options.prompt_tokens,
        tokens=options.tokens,
        repeats=options.repeats,
    )
    if options.json:
        print_json(found)
        return 0
    table = Table(box=None, pad_edge=False)
    for title in ("threads", "prompt tokens/s", "tokens/s", "first token", "peak memory", "load"):
        table.add_column(title, justify="right")
    for row in found["rows"]:
        table.add_row(
            str(row["threads"]), f"{row['prompt_tokens_per_s']:,.1f}", f"{row['tokens_per_s']:,.1f}",
            f"{row['first_token_s']:.3f} s", size(row["peak_rss_bytes"]), f"{row['load_s']:.2f} s",
        )  # fmt: skip
    out = console()
    out.print(f"{found['file']}  {size(found['bytes'])}  {found['about']}", markup=False)
    out.print(table)
    return 0
