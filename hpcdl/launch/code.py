"""What git had when a run was submitted: commit, diff, untracked files listed; kept in `<run_dir>/code/`.

Two checkouts count: the one that the launcher was started in, and hpcdl's own, where it was not installed from
a wheel. Untracked files are named and not copied: they may be large, or secret. Changes of files that hold secrets
(.env, id_rsa) are left out, and secrets in other files' changes are hidden; the record counts both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import hpcdl
from hpcdl import secrets

_given: dict[str, str] | None = None
_LIMIT_S = 20.0
"""A checkout on a slow disk may take its time; a launch must not hang on it."""


def take(files: Mapping[str, str]) -> None:
    """From here on `snapshot` is this, which was taken on the machine that the launch was typed on."""
    global _given
    _given = dict(files)


def snapshot() -> dict[str, str]:
    """Text of each file of `code/`, by name; empty outside of any checkout, or where git is missing."""
    if _given is not None:
        return _given
    files: dict[str, str] = {}
    if shutil.which("git") is None:
        return files
    for folder in dict.fromkeys((Path.cwd(), Path(hpcdl.__file__).parent)):
        root = _git(folder, "rev-parse", "--show-toplevel").strip()
        if not root or f"{Path(root).name}.json" in files:
            continue
        # Neither a diff program nor a converter that the checkout's config names.
        diff, left_out, hidden = public(
            _git(folder, "diff", "--binary", "--no-ext-diff", "--no-textconv", "HEAD")
        )
        record = {
            "commit": _git(folder, "rev-parse", "HEAD").strip() or None,
            "branch": _git(folder, "branch", "--show-current").strip() or None,
            "changed": bool(diff or left_out),
            "left_out": left_out,
            "hidden": hidden,
            "untracked": _git(folder, "ls-files", "--others", "--exclude-standard", ":/").splitlines(),
        }
        files[f"{Path(root).name}.json"] = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        if diff:
            files[f"{Path(root).name}.diff"] = diff
    return files


def commit_of(folder: Path) -> tuple[str, bool]:
    """The commit of the checkout that a folder lies in, and whether the folder differs from it; empty outside."""
    commit = _git(folder, "rev-parse", "HEAD").strip() if shutil.which("git") else ""
    return commit, bool(commit and _git(folder, "status", "--porcelain", "--", ".").strip())


def public(diff: str) -> tuple[str, list[str], int]:
    """A diff without secrets: itself, the files left out, and in how many lines something was hidden.

    A line keeps its place, so that the diff still says what was changed; where one of its unchanged or removed lines
    held a secret, git won't apply it.
    """
    parts = re.split(r"(?m)^(?=diff --git )", diff)
    left_out = [name for part in parts if (name := _changed_file(part)) and secrets.is_file(name)]
    kept = "".join(part for part in parts if _changed_file(part) not in left_out)
    shown = secrets.hide(secrets.mask(kept))
    hidden = sum(a != b for a, b in zip(kept.split("\n"), shown.split("\n"), strict=False))
    return shown, left_out, hidden


def _changed_file(part: str) -> str:
    """The file that a part of a diff is about; empty before the first."""
    found = re.match(r"diff --git (?:\"a/.*?\"|a/.*?) (?:\"b/(.*)\"|b/(.*))$", part.partition("\n")[0])
    return (found.group(1) or found.group(2)) if found else ""


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
