"""What is made once and used by many processes and jobs: converted weights, tokenised text."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hpcdl.runs.files import locked

STALE_S = 6 * 3600
"""A half-made folder that is older was left by a killed process."""


def cache_dir() -> Path:
    """`$HPCDL_CACHE`, or `~/.cache/hpcdl`."""
    return Path(os.environ.get("HPCDL_CACHE") or Path.home() / ".cache" / "hpcdl").absolute()


def once(target: Path, build: Callable[[Path], None]) -> Path:
    """Makes the folder `target` unless it is there, safely beside other ranks, jobs and nodes.

    One process builds, in a folder beside the target that is renamed when whole; the others wait for its
    lock, not in a collective that might time out. Where the file system has no locks, several build and
    the first to rename wins.

    Args:
        target: the folder; its name must say all that its content depends on.
        build: fills the folder that it is given.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / f".{target.name}.lock"):
        if target.exists():
            return target
        for old in target.parent.glob(f".{target.name}.tmp-*"):
            if time.time() - old.stat().st_mtime > STALE_S:
                shutil.rmtree(old, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        try:
            build(temporary)
            make_readable(temporary)
            temporary.rename(target)
        except OSError:
            if not target.exists():  # not a lost race: the disk is full, …
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def anew(target: Path, build: Callable[[Path], None]) -> None:
    """Makes the folder `target`; what was there before goes only once the new one is whole.

    Args:
        target: the folder.
        build: fills the folder that it is given.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        made = temporary / "new"
        made.mkdir()
        build(made)
        make_readable(made)
        if target.exists():
            target.rename(temporary / "old")
        made.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Readable for a group that shares the cache (mkdtemp's folder and safetensors' files are not); on disk."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
            with path.open("rb") as file:
                os.fsync(file.fileno())
