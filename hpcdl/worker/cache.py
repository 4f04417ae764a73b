"""What is made once and used by many processes and jobs: converted weights, tokenised text."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
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
    _make_shelf(target.parent)
    with locked(target.parent / f".{target.name}.lock"):
        if target.exists():
            return target
        for old in target.parent.glob(f".{target.name}.tmp-*"):
            if time.time() - old.stat().st_mtime > STALE_S:
                shutil.rmtree(old, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        try:
            build(temporary)
            make_readable(temporary, as_for=target.parent)
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


def _make_shelf(folder: Path) -> None:
    """A folder of the cache, for those who may read the folder above it; the cache itself for its owner alone, where
    it isn't there yet: a group that shares one makes it for itself.
    """
    if folder.is_dir():
        return
    if folder == cache_dir() or folder.parent == folder:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return
    _make_shelf(folder.parent)
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(OSError):  # another process's, made in this moment
        folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))


def make_readable(folder: Path, *, as_for: Path | None = None) -> None:
    """Readable for those who may read what lies beside it (mkdtemp's folder and safetensors' files are not); on disk.

    Args:
        folder: what has been made.
        as_for: a folder whose readers may read it; by default the umask says who.
    """
    if as_for is None:
        umask = os.umask(0)
        os.umask(umask)
    else:
        umask = ~as_for.stat().st_mode & 0o777
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
            with path.open("rb") as file:
                os.fsync(file.fileno())
