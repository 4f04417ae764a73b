"""A page's blocks run in order, in one folder, and what they print compared with what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.docs.pages import ROOT, Block, Page

LIMIT_S = 1800
"""For one block."""
_NUMBER = re.compile(r"[+-]?\d[\d,.:]*(e-?\d+)?")
_UNIT = re.compile(r"# (KiB|MiB|GiB|TiB|B|kB|MB|GB|ms|s|min|h|µs)\b")
_ID = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,64}\b")


def tell(page: Page, blocks: Iterable[Block], folder: Path, only: str = "") -> None:
    """Runs them; an AssertionError names page, line and command.

    Args:
        page: whose they are.
        blocks: in order; outputs behind the commands that print them.
        folder: where; the repository's files are linked into it.
        only: this kind of block and no other.
    """
    _make(folder)
    printed: str | None = None
    for block in blocks:
        if block.is_output:
            if printed is not None:
                compare(block, printed)
        elif block.language == "bash":
            ours = block.as_run() if not only or block.kind == only else []
            printed = _run(block, ours, folder) if ours else None


def _make(folder: Path) -> None:
    """An empty folder in which the repository's files are where the guide says they are."""
    folder.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("runs", "site"):
            (folder / entry.name).symlink_to(entry)


def _run(block: Block, commands: list[str], folder: Path) -> str:
    """What a block prints, errors among it."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HPCDL_RUNS": str(folder / "runs"),
        "COLUMNS": "100",
    }
    fails = int(block.words or 2) if block.kind == "fails" else 0
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == fails, f"{block.where}: exit code {done.returncode}\n{commands}\n{done.stdout}"
    return done.stdout


def compare(block: Block, printed: str) -> None:
    """Each line of the page comes in what was printed, in that order; numbers, times, ids and spaces count as equal."""
    lines = iter([alike(line) for line in printed.splitlines()])
    for shown in block.lines:
        wanted = alike(shown)
        if wanted in ("", "…"):
            continue
        start = wanted.removesuffix("…").rstrip()
        assert any(line == wanted or (wanted.endswith("…") and line.startswith(start)) for line in lines), (
            f"{block.where}: not printed (or not in this order): {shown}\n{printed}"
        )


def alike(line: str) -> str:
    """A line less what differs from run to run."""
    line = _ID.sub("ID", line.replace("−", "-"))
    line = re.sub(r"[━─═█▇▆▅▄▃▂▁▏▎▍▌▋▊▉░▒▓▲▼│]+", " ", line)
    line = _UNIT.sub("# U", _NUMBER.sub("#", line))
    return " ".join(line.split())
