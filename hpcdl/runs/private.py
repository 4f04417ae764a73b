"""Who may read what a run leaves, and whose files are trusted.

Private by default: the launcher makes folders with the umask that `readable_by` names, and so does the job, which
reads it off its run directory; a file that is made anew takes its readers from the folder that it lies in. So the
run directory's mode is the one place that says it, whatever the umask of who writes.

Trusted are a user's own files only. A run directory says what is executed (`cluster.env`, `cluster.setup`), so an
agent refuses one that belongs to somebody else, or holds somebody else's files. Nothing is written through a
symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from hpcdl.errors import UsageError

Readers = Literal["owner", "group", "all"]
MASKS: dict[str, int] = {"owner": 0o077, "group": 0o027, "all": 0o022}
"""The umask of each `readable_by`."""
READ_AT_ONCE = 1 << 20
"""Bytes of a file that isn't as long as it said."""


@contextlib.contextmanager
def made_for(readers: Readers, *above: Path) -> Iterator[None]:
    """Files and folders made meanwhile, and by processes started meanwhile, are for these readers.

    Args:
        readers: who.
        above: folders that they have to get through; those that are there and this user's are opened for them.
    """
    before = os.umask(MASKS[readers])
    try:
        for folder in above:
            with contextlib.suppress(OSError):  # not there yet, or somebody else's
                mode = folder.stat().st_mode
                if (wanted := mode | (0o755 & ~MASKS[readers])) != mode:
                    folder.chmod(stat.S_IMODE(wanted))
        yield
    finally:
        os.umask(before)


def take_over(folder: Path) -> None:
    """Sets this process's umask, and its children's, to what a folder's mode says."""
    os.umask(~folder.stat().st_mode & 0o777)


def open_to_write(path: Path, flags: int) -> int:
    """A descriptor of `path`, made if it isn't there, for the readers of its folder; never through a link.

    Args:
        path: the file.
        flags: of os.open, without O_CREAT.

    Raises:
        UsageError: it is a symbolic link: what is written might go anywhere.
    """
    mode = path.parent.stat().st_mode & 0o644  # nobody but the owner writes
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UsageError(f"{path} is a symbolic link: nothing is written through it; remove it") from error
    found = os.fstat(descriptor)
    if found.st_uid == os.geteuid() and found.st_mode & 0o777 != mode:
        with contextlib.suppress(OSError):  # a file system without modes
            os.fchmod(descriptor, mode)
    return descriptor


def open_text(path: Path) -> IO[Any]:
    """`path` emptied and open for text; see `open_to_write`."""
    return os.fdopen(open_to_write(path, os.O_WRONLY | os.O_TRUNC), "w", encoding="utf-8")


def open_to_read(path: Path) -> IO[bytes]:
    """`path` open for bytes. In another user's run it may be anything: a named pipe would be waited for, for ever.

    Raises:
        OSError: it can't be opened, or is no ordinary file.
    """
    return os.fdopen(_open_ordinary(path)[0], "rb")


def _open_ordinary(path: Path) -> tuple[int, int]:
    """A descriptor and the file's size; see `open_to_read`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no ordinary file", os.fspath(path))
    return descriptor, found.st_size


def read_text(path: Path) -> str:
    """The text of an ordinary file, in as few system calls as can be: thousands are read; see `open_to_read`."""
    descriptor, size = _open_ordinary(path)
    try:
        data = os.read(descriptor, size + 1)
        while len(data) != size and (more := os.read(descriptor, READ_AT_ONCE)):  # it has grown since
            data += more
    finally:
        os.close(descriptor)
    return data.decode("utf-8")


def owner(path: Path) -> str:
    """Name of a file's owner, or its number."""
    import pwd  # as below: only where something is wrong

    number = path.lstat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def is_mine(path: Path) -> bool:
    """Whether a file or folder is this user's (or root's, who can do everything anyway).

    On a file system that gives every file another owner (NFS with all_squash), whoever may write there is: that is
    found out by writing.
    """
    number = path.lstat().st_uid
    if number in (os.geteuid(), 0):
        return True
    import tempfile

    folder = path if path.is_dir() and not path.is_symlink() else path.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".owner-") as probe:
            return os.fstat(probe.fileno()).st_uid == number
    except OSError:
        return False


def require_mine(folder: Path) -> None:
    """Refuses a folder that says what is executed and is, or holds, somebody else's.

    Raises:
        UsageError: it isn't this user's, others may write in it, or something right in it isn't this user's.
    """
    if not is_mine(folder):
        raise UsageError(
            f"{folder} belongs to {owner(folder)}: what a run directory says is executed, so hpcdl runs your own"
            " only\nfix: launch the experiment yourself (runs_dir=…); trainer.resume_from=RUN goes on from"
            " another's checkpoint without running anything of it"
        )
    mode = folder.lstat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise UsageError(
            f"{folder}: everybody may write in it, and it says what is executed\nfix: chmod o-w {folder}"
        )
    owners: dict[int, str] = {}
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # other nodes' agents put files there and take them away
            owners[entry.stat(follow_symlinks=False).st_uid] = entry.path
    foreign = [path for number, path in owners.items() if number not in (os.geteuid(), 0)]
    for path in foreign:
        if not is_mine(Path(path)):
            raise UsageError(f"{path} in your run directory belongs to {owner(Path(path))}: remove it")


def warnings_about(runs_dir: Path) -> list[str]:
    """What is unsafe about a folder of runs that others may write in: they can put another run in a run's place."""
    said = []
    for folder in (runs_dir, *runs_dir.parents):
        try:
            found = folder.stat()
        except OSError:
            continue
        everybody = found.st_mode & stat.S_IWOTH
        some = found.st_mode & stat.S_IWGRP and found.st_gid != os.getegid()
        if (everybody or (some and folder == runs_dir)) and not found.st_mode & stat.S_ISVTX:
            who = "everybody" if everybody else "its group"
            said.append(
                f"{who} may write in {folder}, and so put another run in the place of yours"
                f" (chmod {'o' if everybody else 'g'}-w {folder}, or chmod +t {folder})"
            )
    return said
