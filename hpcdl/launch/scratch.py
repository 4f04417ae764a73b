"""A folder on the node's own disk that is this user's alone, for what is executed from there again.

torch.compile keeps compiled code in `/tmp/torchinductor_<user>` by default, and runs what it finds there: whoever makes
a folder of that name first has his code run.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def caches(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that put caches of code where nobody else can write; none where the user has said where."""
    if CACHE in environment:
        return {}
    folder = Path(tempfile.gettempdir()) / f"hpcdl-{os.geteuid()}"
    if not _is_private(folder):  # somebody else has it: the home directory is slower, and one's own
        folder = Path.home() / ".cache" / "hpcdl"
    return {CACHE: str(folder / "inductor")}


def _is_private(folder: Path) -> bool:
    """Whether a folder is there, or could be made, and only this user can write in it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
