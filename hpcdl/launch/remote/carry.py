"""This machine's hpcdl, copied to the login node: what runs there is the code as it was when the launch was typed.

The same copy that a launch on the login node makes (hpcdl.launch.frozen), in the same place: `<runs>/.code/<digest>`.
Carried once for all launches of the same code, and made from here even where pip has installed hpcdl, so that the two
sides can't be of different versions.
"""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import hpcdl
from hpcdl.launch import frozen
from hpcdl.launch.remote import envelope
from hpcdl.launch.remote.connection import FAILED, Connection, HostError, in_words
from hpcdl.launch.remote.probe import Login
from hpcdl.runs import terminal


@cache
def mine() -> frozen.Code:
    """The code of this process."""
    return frozen.here() or frozen.read(Path(hpcdl.__file__).resolve().parent)


def code(connection: Connection, login: Login) -> str:
    """Sees to it that the code is there; returns its folder.

    Raises:
        HostError: it could not be carried; nothing half of it is left in its place.
    """
    folder = f"{login.place.folder}/{frozen.FOLDER}"
    target = f"{folder}/{mine().digest}"
    if mine().digest in login.codes:
        return target
    coming = f"{folder}/.coming-{mine().digest}-{secrets.token_hex(4)}"
    _run(connection, f"umask 077; mkdir -p -- {envelope.words([coming])}")
    _rsync(connection, coming)
    new, own = envelope.words([coming]), envelope.words([target])
    # Whole or not at all; where another launch was quicker, its copy is the same.
    _run(connection, f"mv -T -- {new} {own} 2>/dev/null || {{ rm -rf -- {new}; [ -d {own} ]; }}")
    return target


def for_now(connection: Connection) -> str:
    """The same in a folder of /tmp there, for what may change nothing; whoever uses it takes it away."""
    done = _run(connection, "umask 077; mktemp -d /tmp/hpcdl-XXXXXXXX")
    folder = done.strip()
    _rsync(connection, folder)
    return folder


def _run(connection: Connection, script: str) -> str:
    done = connection.capture(script, limit_s=60)
    if done.code != 0:
        said = done.stderr.strip().splitlines()
        raise HostError(
            connection.host, f"the code can't be carried there: {said[-1] if said else script}", ""
        )
    return done.stdout


def _rsync(connection: Connection, folder: str) -> None:
    with tempfile.TemporaryDirectory(prefix="hpcdl-") as staged:
        frozen.copy(mine(), Path(staged))
        # -s: no shell there reads the paths. Whole files: between rsync 3.5 and 3.2 differences did not add up.
        flags = ["-rtps", "--chmod=go-rwx", "--exclude=__pycache__", "--compress", "--whole-file"]
        transfer(connection, [*flags, f"{staged}/", f"{connection.host}:{folder}/"])


def transfer(connection: Connection, arguments: list[str]) -> None:
    """Runs rsync over the connection that stands.

    Raises:
        HostError: it has failed; carries its words.
    """
    done = subprocess.run(
        ["rsync", f"--rsh={connection.rsync_shell}", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return
    if done.returncode == FAILED:
        raise HostError(connection.host, *in_words(done.stderr, connection.host))
    said = [line for line in terminal.harmless(done.stderr).splitlines() if line.strip()]
    # The last line says where in rsync's source it was; what has failed stands before it.
    why = next(
        (line for line in said if not line.startswith("rsync error:")), said[-1] if said else "rsync failed"
    )
    fix = (
        "make room there, or cluster.login_dir=… on another disk"
        if "No space" in why or "quota" in why
        else ""
    )
    raise HostError(connection.host, f"the code can't be carried there: {why.strip()}", fix)
