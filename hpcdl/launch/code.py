"""What git had when a run was submitted: commit, diff, untracked files listed; kept in `<run_dir>/code/`.

Two checkouts count: the one that the launcher was started in, and hpcdl's own, where it was not installed from
a wheel. Untracked files are named and not copied: they may be large, or secret.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import hpcdl

_LIMIT_S = 20.0
"""A checkout on a slow disk may take its time; a launch must not hang on it."""


def snapshot() -> dict[str, str]:
    """Text of each file of `code/`, by name; empty outside of any checkout, or where git is missing."""
    files: dict[str, str] = {}
    if shutil.which("git") is None:
        return files
    for folder in dict.fromkeys((Path.cwd(), Path(hpcdl.__file__).parent)):
        root = _git(folder, "rev-parse", "--show-toplevel").strip()
        if not root or f"{Path(root).name}.json" in files:
            continue
        diff = _git(folder, "diff", "--binary", "HEAD")
        record = {
            "commit": _git(folder, "rev-parse", "HEAD").strip() or None,
            "branch": _git(folder, "branch", "--show-current").strip() or None,
            "changed": bool(diff),
            "untracked": _git(folder, "ls-files", "--others", "--exclude-standard", ":/").splitlines(),
        }
        files[f"{Path(root).name}.json"] = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        if diff:
            files[f"{Path(root).name}.diff"] = diff
    return files


def _git(folder: Path, *words: str) -> str:
    """What git prints, or nothing where it has nothing to say (no checkout, no commit yet, not ours)."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.decode("utf-8", errors="surrogateescape") if done.returncode == 0 else ""


def _bytes(text: str) -> bytes:
    """A diff as git gave it, whatever its encoding."""
    return text.encode("utf-8", errors="surrogateescape")


def keep(files: Mapping[str, str], folder: Path) -> None:
    """Writes the snapshot into a submission's folder, once for all its runs."""
    if files:
        (folder / "code").mkdir(exist_ok=True)
    for name, text in files.items():
        target = folder / "code" / name
        target.write_bytes(_bytes(text))


def give(files: Mapping[str, str], folder: Path, run_dir: Path) -> None:
    """Gives a run the submission's snapshot, as second names of the same files."""
    target = run_dir / "code"
    shutil.rmtree(target, ignore_errors=True)  # an earlier attempt's: the resumed run goes on with this code
    if files:
        target.mkdir()
    for name, text in files.items():
        try:
            os.link(folder / "code" / name, target / name)
        except OSError:  # a file system without hard links
            (target / name).write_bytes(_bytes(text))
