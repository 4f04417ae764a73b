"""Writing files so that a process killed at any line leaves the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replaces `path` by `text`: temporary file beside it, fsync, rename.

    Args:
        path: file to replace; its folder must exist.
        text: new content.
        durable: fsync before the rename. A caller that makes many files at once passes False
            and calls `os.sync()` before anything depends on them.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replaces `path` by `value` as JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", durable=durable)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line with a single write, so that lines of several writers don't mix."""
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines of a file; a torn last line (its writer was killed) is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def last_line(path: Path, *, having: str | None = None, window: int = 65536) -> dict[str, Any] | None:
    """The last whole JSON line (that has the key `having`), reading only the file's end."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - window))
            tail = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    for line in reversed(tail.splitlines()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and (having is None or having in record):
            return record
    return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` (POSIX lock: the kernel frees it when its holder dies).

    A file system without locks (Lustre mounted without `-o flock`) is said once, as a warning: the
    window that the lock closes is some milliseconds wide.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            warnings.warn(f"{path.parent}: this file system has no locks ({error.strerror})", stacklevel=2)
        yield
    finally:
        os.close(descriptor)
