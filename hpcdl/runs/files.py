"""Writing files so that a process killed at any line leaves the old content or the new, never half of it.

On a full disk nothing that was there is lost: a file that is to be replaced stays (small ones can be overwritten in
their own block, which needs no room), and lines that find no room wait in memory until there is some.

Who may read a file is told by the folder that it lies in, and nothing is written through a symbolic link
(hpcdl.runs.private).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcdl.runs.private import open_text, open_to_read, open_to_write

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a user's quota, a limit on files (`ulimit -f`)."""

FIRST_WINDOW = 2048
"""Bytes of a file's end that are looked at first."""
_waiting: dict[Path, list[bytes]] = {}
"""Lines that found no room, by file."""
_appending = threading.Lock()


def is_full(error: BaseException) -> bool:
    """Whether it is that there is no room: by an OSError's number, or by what safetensors and torch say of one."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return any(f"(os error {number})" in str(error) for number in NO_ROOM)


def write_atomic(path: Path, text: str, *, durable: bool = True, into_own_block: bool = False) -> None:
    """Replaces `path` by `text`: temporary file beside it, fsync, rename.

    Args:
        path: file to replace; its folder must exist.
        text: new content.
        durable: fsync before the rename. A caller that makes many files at once passes False
            and calls `os.sync()` before anything depends on them.
        into_own_block: where the disk is full, overwrite what the file has room for already, by one write.

    Raises:
        OSError: it can't be written; then `path` is as it was, and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open_text(temporary) as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not (into_own_block and is_full(error) and _overwrite(path, text.encode())):
            raise


def _overwrite(path: Path, data: bytes) -> bool:
    """Overwrites a file within the blocks that it has; whether that was enough.

    One pwrite(2), padded with spaces to the old length: a killed process leaves the old or the new, and a reader
    finds JSON at any moment. Only a node that loses its power in between could tear it.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        now = os.fstat(descriptor)
        padded = data.rstrip(b"\n").ljust(now.st_size - 1) + b"\n"
        if len(padded) > now.st_blocks * 512:
            return False
        done = os.pwrite(descriptor, padded, 0) == len(padded)
        os.fsync(descriptor)
        return done
    except OSError:
        return False
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, *, durable: bool = True, into_own_block: bool = False) -> None:
    """Replaces `path` by `value` as JSON, atomically; as `write_atomic`."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, text, durable=durable, into_own_block=into_own_block)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line with a single write, so that lines of several writers don't mix.

    Where there is no room it waits in this process's memory, which is said once on standard error, and goes in
    before the next line that has room; `unwritten` tells how many wait.
    """
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    with _appending:
        waited = bool(_waiting.get(path))
        _waiting.setdefault(path, []).append(line)
        error = _append_waiting(path)
        if error is not None and not is_full(error):
            _waiting[path].pop()
            raise error
    if error is not None and not waited:
        text = f"{path}: {error.strerror}: its lines wait in memory until there is room"
        print(f"hpcdl: {text}", file=sys.stderr, flush=True)


def unwritten(path: Path) -> int:
    """How many lines of this process still find no room in a file, after one more try."""
    with _appending:
        _append_waiting(path)
        return len(_waiting.get(path, ()))


def _append_waiting(path: Path) -> OSError | None:
    """Appends the lines that wait, in their order; why one can't be, if one can't."""
    lines = _waiting.get(path, [])
    try:
        while lines:
            append_bytes(path, lines[0])
            lines.pop(0)
    except OSError as error:
        return error
    _waiting.pop(path, None)
    return None


def append_bytes(path: Path, line: bytes) -> None:
    """Appends a whole line; after another's torn one (its writer's disk was full) on a line of its own.

    Raises:
        OSError: there is no room for it; what was written of it is taken back.
    """
    descriptor = open_to_write(path, os.O_RDWR | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        done = os.write(descriptor, line)
        try:
            while done < len(line):  # there was room for a part: the next write says why
                done += os.write(descriptor, line[done:])
        except OSError:
            end = os.lseek(descriptor, 0, os.SEEK_CUR)
            if os.fstat(descriptor).st_size == end:  # nobody has written behind it
                os.ftruncate(descriptor, end - done)
            raise
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines of a file; a torn last line (its writer was killed) is left out."""
    try:
        with open_to_read(path) as file:
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [record for record in _parsed(text) if isinstance(record, dict)]


def _parsed(text: str) -> list[Any]:
    """The lines' JSON, all at once, which is quicker; one by one where one of them is none."""
    whole = text.strip("\n")
    with contextlib.suppress(ValueError, RecursionError):
        records: list[Any] = json.loads(f"[{whole.replace(chr(10), ',')}]")
        if len(records) == whole.count("\n") + 1:
            return records
    records = []
    # Not splitlines(): a text in a record may hold what that takes for a line's end.
    for line in whole.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return records


def last_line(path: Path, *, having: str | None = None, window: int = 65536) -> dict[str, Any] | None:
    """The last whole JSON line (that has the key `having`), reading only the file's end."""
    try:
        with open_to_read(path) as file:
            end = file.seek(0, os.SEEK_END)
            for size in (min(FIRST_WINDOW, window), window):  # nearly always it is one of the very last
                file.seek(max(0, end - size))
                found = _last_of(file.read(), having)
                if found is not None or size >= min(end, window):
                    return found
    except FileNotFoundError:
        return None
    return None


def _last_of(tail: bytes, having: str | None) -> dict[str, Any] | None:
    for line in reversed(tail.decode("utf-8", errors="replace").split("\n")):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # torn; or another user's, which may hold anything
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
    descriptor = open_to_write(path, os.O_RDWR)
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
