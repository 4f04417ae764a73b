"""The code that a job runs: hpcdl as it was at submission, in `<runs_dir>/.code/<digest>/`.

A job may wait for days, and be started again after that; meanwhile the checkout that hpcdl is installed from goes on.
So the launcher copies the package, once for all submissions of the same code: the folder's name is a digest of its
files. Job scripts put it before everything that is installed, and an agent that finds itself running other code
refuses. The configs and templates that lie beside the package in a checkout go along: a job may call hpcdl itself
(a teardown line that evaluates). spec.yaml says which code it was (`code`); what git says of it is in the run's own
`code/` (hpcdl.launch.code).

A package that pip has put into site-packages is not copied: it changes when its environment does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hpcdl
from hpcdl import secrets
from hpcdl.errors import UsageError
from hpcdl.launch import code
from hpcdl.runs import private

FOLDER = ".code"
"""Of the folder of all runs."""
VARIABLE = "HPCDL_CODE"
"""Where the code lies that a job was submitted with."""
LARGEST_FILE = 2**20
"""Bytes. A larger file in the package is no code; it is left out, and about.json says so."""
_ABOUT = "about.json"
_INSTALLED = ("site-packages", "dist-packages")
_BESIDE = ("conf", "slurm")
_LEFT_OUT = ("__pycache__", ".git", ".mypy_cache", ".ruff_cache")


@dataclass(frozen=True, slots=True)
class Code:
    """The package as it is now."""

    digest: str
    """Of its files' names and contents."""
    package: Path
    files: Mapping[str, tuple[bytes, int]]
    """Content and time (ns), by the path from the folder that the package lies in. Read once: an edit in between is
    in the next launch's."""
    left_out: tuple[str, ...]
    """Files that are too large, or hold secrets."""
    commit: str
    """Of the checkout that it lies in; empty outside of one."""
    changed: bool
    """Whether the package differs from that commit."""

    @property
    def identity(self) -> str:
        """What spec.yaml says of it."""
        commit = f", commit {self.commit[:12]}{' and changes' if self.changed else ''}" if self.commit else ""
        return f"hpcdl {hpcdl.__version__}, sha256 {self.digest}{commit}"


@cache
def here() -> Code | None:
    """The code of this process, as it is on the disk; None where pip has installed it."""
    package = Path(hpcdl.__file__).resolve().parent
    return None if is_installed(package) else read(package)


def is_installed(package: Path) -> bool:
    """Whether pip has put the package where it is."""
    return any(part in _INSTALLED for part in package.parts)


def identity() -> str:
    """What spec.yaml says of the code of this process."""
    found = here()
    return f"hpcdl {hpcdl.__version__}" if found is None else found.identity


def read(package: Path) -> Code:
    """A package's files and what belongs to it beside it, and a digest of them."""
    files: dict[str, tuple[bytes, int]] = {}
    left_out = []
    folders = [package]
    if not is_installed(package):  # there other packages lie beside it
        folders += [beside for name in _BESIDE if (beside := package.parent / name).is_dir()]
    for path in sorted(path for folder in folders for path in _files(folder)):
        name, found = path.relative_to(package.parent).as_posix(), path.stat()
        if found.st_size > LARGEST_FILE or secrets.is_file(name):
            left_out.append(name)
        else:
            files[name] = path.read_bytes(), found.st_mtime_ns
    digest = hashlib.sha256()
    for name, (content, _) in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    name = digest.hexdigest()[:16]
    commit, changed = _told(package.parent / _ABOUT, name) or code.commit_of(package)
    return Code(name, package, files, tuple(left_out), commit, changed)


def _told(about: Path, digest: str) -> tuple[str, bool] | None:
    """What git said of a copy where it was made; None where this is none, or was changed."""
    try:
        record = json.loads(about.read_text(encoding="utf-8"))
        return (str(record["commit"]), bool(record["changed"])) if record["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _LEFT_OUT:
                yield from _files(Path(entry.path))
        elif entry.is_file() and not entry.name.endswith((".pyc", ".tmp", ".swp")):
            yield Path(entry.path)


def folder_in(runs_dir: Path) -> Path | None:
    """Where the code of this process lies, or will, for jobs of these runs; None where it is not copied."""
    found = here()
    return None if found is None else runs_dir / FOLDER / found.digest


def write(folder: Path) -> None:
    """Makes the copy, unless it is there; complete or not at all.

    Raises:
        UsageError: a folder of that name is somebody else's.
    """
    found = here()
    assert found is not None and folder.name == found.digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    private.require_mine(folder.parent)
    if not folder.exists():
        made = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        try:
            copy(found, made)
            made.chmod(0o777 & ~_umask())
            made.rename(folder)
        except OSError:
            if not folder.exists():  # another launcher was quicker
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    private.require_mine(folder)


def copy(found: Code, target: Path) -> None:
    """The files, with their times: what Python has compiled of them stays valid, and is taken along."""
    about = {
        "identity": found.identity,
        "digest": found.digest,
        "commit": found.commit,
        "changed": found.changed,
        "from": str(found.package),
        "left_out": found.left_out,
    }
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    (target / _ABOUT).write_text(text, encoding="utf-8")
    for name, (content, time_ns) in found.files.items():
        source, made = found.package.parent / name, target / name
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(content)
        os.utime(made, ns=(time_ns, time_ns))
        for compiled in (
            source.parent.glob(f"__pycache__/{source.stem}.*.pyc") if source.suffix == ".py" else ()
        ):
            (made.parent / "__pycache__").mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # being written anew in this moment
                shutil.copyfile(compiled, made.parent / "__pycache__" / compiled.name)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def require(environment: Mapping[str, str]) -> None:
    """Refuses to go on with other code than the job was submitted with.

    Raises:
        UsageError: it is gone, or something else was found before it.
    """
    wanted = environment.get(VARIABLE)
    running = Path(hpcdl.__file__).resolve().parent
    if wanted and running.parent != Path(wanted).resolve():
        raise UsageError(
            f"this job was submitted with the code in {wanted}, which "
            f"{'is not found first' if Path(wanted).is_dir() else 'is gone'}; it runs {running}\n"
            "fix: launch again; it goes on from the last checkpoint"
        )
