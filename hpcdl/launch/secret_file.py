"""The user's file of secrets, read on each node of a job: `~/.config/hpcdl/secrets.env`, or `$HPCDL_SECRETS`.

A line is `NAME=VALUE` (`export NAME=VALUE` and quotes as a shell has them); `#` begins a comment. What the job's
environment has already goes before it. The file must be the user's own, and no one else's to read.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import MutableMapping
from pathlib import Path

from hpcdl import secrets
from hpcdl.errors import RunFailedError
from hpcdl.runs.private import is_mine, owner

VARIABLE = "HPCDL_SECRETS"
_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)")


def load(environment: MutableMapping[str, str]) -> None:
    """Adds what the file holds to an environment; nothing where there is no file, and none was named.

    Raises:
        RunFailedError: the file named isn't there, is not this user's own, others may read it, or a line is no
            NAME=VALUE. No message shows a value.
    """
    named = environment.get(VARIABLE)
    file = Path(named or secrets.FILE).expanduser()
    try:
        _require_private(file)
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if named:
            raise RunFailedError(f"{VARIABLE}={file} is not there on this node") from error
        return
    except OSError as error:
        raise RunFailedError(f"{file}: {error.strerror}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, value = _parse(line, f"{file}, line {number}")
        environment.setdefault(name, value)
    secrets.of_this_process.cache_clear()  # from here on these values are known, and hidden


def _require_private(file: Path) -> None:
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise RunFailedError(f"{file} is no ordinary file")
    if not is_mine(file.resolve()):
        raise RunFailedError(f"{file} belongs to {owner(file.resolve())}, not to you")
    if found.st_mode & 0o077:
        raise RunFailedError(
            f"{file} can be read by others than you\nfix: chmod 600 {shlex.quote(os.fspath(file))}"
        )


def _parse(line: str, where: str) -> tuple[str, str]:
    found = _LINE.fullmatch(line)
    try:
        words = shlex.split(found.group(2), comments=True) if found else []
    except ValueError:
        found = None
    if found is None or len(words) > 1:
        raise RunFailedError(f"{where}: not NAME=VALUE (a value with spaces stands in quotes)")
    return found.group(1), words[0] if words else ""
