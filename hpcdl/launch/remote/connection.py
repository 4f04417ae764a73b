"""One ssh connection to a login node, shared by all that is done there; OpenSSH's own programs do the work.

The first command opens it (with whatever ~/.ssh/config says: jump hosts, keys, ports) and it stays for some minutes
after the last. Who has a shared connection configured already (ControlMaster, ControlPath) goes on using that one.
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hpcdl.errors import Fault, HpcdlError
from hpcdl.launch.remote import envelope
from hpcdl.runs import terminal

PERSIST_S = 600
CONNECT_S = 15
ALIVE_S, ALIVE_TIMES = 15, 3
"""A connection that is silent for so long, so many times, is given up."""
LONGEST_PATH = 80
"""Characters of the folder of a socket: the whole name has room for about 100, of which ssh wants 17 for itself."""
BROKEN_PIPE = 141
FAILED = 255
"""ssh's own exit code, where it isn't the command's."""


class HostError(HpcdlError):
    """The login node could not be reached, or the connection was cut; carries what to say of it."""

    exit_code = 3

    def __init__(self, host: str, problem: str, fix: str) -> None:
        self.host, self.problem, self.fix = host, problem, fix
        super().__init__(f"{host}: {problem}{fix and f'{chr(10)}fix: {fix}'}")

    @property
    def fault(self) -> Fault:
        """As a fault of the config, of which nothing was submitted."""
        return Fault(key="cluster.login_host", value=self.host, problem=self.problem, fix=self.fix)


@dataclass(frozen=True, slots=True)
class Done:
    """A script that has ended there."""

    code: int
    stdout: str
    """From the mark on."""
    stderr: str
    noise: str
    """What start-up files printed before it."""


class Connection:
    """A host, and how ssh is called for it.

    Args:
        host: as ssh takes it; hpcdl.experiment.login has judged its form.
    """

    def __init__(self, host: str) -> None:
        self.host = host

    @cached_property
    def options(self) -> list[str]:
        """The program and the options of every call."""
        return ["ssh", *(word for option in self._settings() for word in ("-o", option))]

    def _settings(self) -> list[str]:
        theirs = self._configured()
        settings = [
            "LogLevel=ERROR",  # not "Shared connection to … closed."
            "ClearAllForwardings=yes",  # ports that a login forwards are taken by the login already
            "RemoteCommand=none",
            "PermitLocalCommand=no",
            "RequestTTY=no",
            *([] if _is_asked() else ["BatchMode=yes"]),
        ]
        if theirs.get("connecttimeout", "none") in ("none", "0"):
            settings.append(f"ConnectTimeout={CONNECT_S}")
        if theirs.get("serveraliveinterval", "0") == "0":
            settings += [f"ServerAliveInterval={ALIVE_S}", f"ServerAliveCountMax={ALIVE_TIMES}"]
        shared = (
            theirs.get("controlmaster", "false") != "false" and theirs.get("controlpath", "none") != "none"
        )
        if not shared:
            path = _socket_folder() / hashlib.sha256(self.host.encode()).hexdigest()[:16]
            settings += ["ControlMaster=auto", f"ControlPersist={PERSIST_S}", f"ControlPath={path}"]
        return settings

    def _configured(self) -> dict[str, str]:
        """What ~/.ssh/config makes of this host."""
        if shutil.which("ssh") is None:
            raise HostError(
                self.host,
                "ssh is not installed here",
                "install OpenSSH's client (apt install openssh-client)",
            )
        done = subprocess.run(["ssh", "-G", "--", self.host], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise self._failed(done.stderr)
        return dict(line.lower().split(" ", 1) for line in done.stdout.splitlines() if " " in line)

    @property
    def rsync_shell(self) -> str:
        """What rsync's --rsh is given, which splits it at spaces; none of the options has one."""
        return " ".join(self.options)

    def open(self) -> None:
        """Makes the connection, unless it stands.

        Raises:
            HostError: it can't be made.
        """
        check = subprocess.run(
            [*self.options, "-O", "check", "--", self.host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if check.returncode != 0:
            self.capture(":")

    def capture(self, script: str, *, data: str = "", limit_s: float | None = None) -> Done:
        """Runs a script there; returns what it printed.

        Args:
            script: bash.
            data: its standard input, which stays open until it ends: a script that watches it sees when we are gone.
            limit_s: longest wait, in seconds.

        Raises:
            HostError: ssh has failed, before or while it ran.
        """
        argv = [*self.options, "--", self.host, envelope.enveloped(envelope.marked(script))]
        # A file: the shared connection that ssh leaves behind may hold a pipe open for ever.
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            try:
                output = _talk(process, data, limit_s)
            except subprocess.TimeoutExpired as error:
                raise HostError(self.host, f"no answer within {limit_s:.0f} s", "try again later") from error
            finally:
                _end(process)
            errors.seek(0)
            stderr = errors.read().decode("utf-8", "replace")
        if process.returncode == FAILED:
            raise self._failed(stderr)
        noise, stdout = envelope.after_mark(output)
        return Done(process.returncode, stdout, stderr, noise)

    def stream(self, script: str) -> int:
        """Runs a script there with this process's own output, on a terminal where this has one; its exit code.

        Raises:
            HostError: the connection was cut, or could not be made.
        """
        on_terminal = sys.stdout.isatty()
        sys.stdout.flush()
        argv = [*self.options, *(["-tt"] if on_terminal else []), "--", self.host, envelope.enveloped(script)]
        keyboard = None if on_terminal and sys.stdin.isatty() else subprocess.PIPE
        process = subprocess.Popen(argv, stdin=keyboard)
        try:
            code = process.wait()
        finally:
            _end(process)
        if code == FAILED and _is_read(1):
            raise HostError(self.host, "the connection was cut", "")
        return code if code != FAILED else BROKEN_PIPE

    def _failed(self, stderr: str) -> HostError:
        problem, fix = in_words(stderr, self.host)
        return HostError(self.host, problem, fix)


def _is_asked() -> bool:
    """Whether somebody sits there who can be asked for a password or a code."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _is_read(descriptor: int) -> bool:
    """Whether somebody still reads what is written there: `head` has had enough at some point."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _talk(process: subprocess.Popen[bytes], data: str, limit_s: float | None) -> str:
    """Sends the input and reads the output to its end, with the input still open."""
    import threading

    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(limit_s, process.kill) if limit_s else None
    if timer:
        timer.start()
    try:
        try:
            process.stdin.write(data.encode("utf-8", "surrogateescape"))
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already, and says why
        output = process.stdout.read()
        process.wait()
    finally:
        if timer:
            timer.cancel()
    if timer and process.returncode == -9:
        raise subprocess.TimeoutExpired(process.args, limit_s or 0)
    return output.decode("utf-8", "replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leaves no ssh behind; what it runs there sees its input end."""
    if process.stdin is not None:
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
    if process.poll() is None:
        process.terminate()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _socket_folder() -> Path:
    """A private folder for the connection's socket: who can write to the socket is logged in there.

    Raises:
        HostError: somebody else has made it.
    """
    above = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")
    fits = (
        above.is_dir()
        and len(str(above)) < LONGEST_PATH
        and str(above).isascii()
        and not set(" %'\"") & set(str(above))
    )
    folder = above / "hpcdl-ssh" if fits else Path(f"/tmp/hpcdl-ssh-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise HostError(
            str(folder), "must be a folder of yours that nobody else can enter", f"rm -r {folder}"
        )
    return folder


_NETWORK = "is the network up, and a VPN where it needs one? ssh {host} must work"
_MEANINGS = (
    ("Could not resolve hostname", "no host has this name",
     "user@host, or a name of ~/.ssh/config, with which ssh {host} works"),
    ("HOST IDENTIFICATION HAS CHANGED", "its key is another one than before: it may be another machine",
     "ask who runs it; then ssh-keygen -R {bare}, and ssh {host} once"),
    ("Host key verification failed", "its key is not known here", "ssh {host} once, by hand, and compare its key"),
    ("Permission denied", "it refuses to let you in",
     "ssh {host} must work without a password: ssh-copy-id {host}, or ssh-add"),
    ("Too many authentication failures", "it refuses to let you in", "IdentitiesOnly yes in ~/.ssh/config"),
    ("Connection refused", "nothing listens there on ssh's port", "is it up? Another port belongs into ~/.ssh/config"),
    ("Connection timed out", "no answer", _NETWORK),
    ("Network is unreachable", "the network doesn't reach it", _NETWORK),
    ("No route to host", "the network doesn't reach it", _NETWORK),
    ("Bad owner or permissions", "ssh doesn't trust ~/.ssh/config as it is", "chmod 600 ~/.ssh/config"),
    ("terminating, ", "ssh doesn't understand its configuration", "ssh {host} says where"),
)  # fmt: skip


def in_words(stderr: str, host: str) -> tuple[str, str]:
    """What ssh's message means, with the message, and what to do."""
    said = [line.strip() for line in terminal.harmless(stderr).splitlines() if line.strip(" @")]
    last = said[-1] if said else ""
    for sign, problem, fix in _MEANINGS:
        if sign in stderr:
            line = next((line for line in reversed(said) if sign in line), last)
            return f"{problem} ({line})", fix.format(host=host, bare=host.rpartition("@")[2])
    return f"the connection failed or was cut{f' ({last})' if last else ''}", f"ssh {host} must work"
