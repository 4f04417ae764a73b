"""A login node on this machine's loopback address: a real sshd for this user, with a home and a Slurm of its own.

What a session there sees is made by one script (ForceCommand): another home, the fake Slurm on PATH, none of the
laptop's environment. `ssh` on the laptop's PATH is OpenSSH's own with a configuration of its own.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.fake_slurm import BIN, FakeSlurm

SSHD = "/usr/sbin/sshd"
WHY_NOT = next(
    (f"{program} is not installed" for program in (SSHD, "ssh", "rsync") if shutil.which(program) is None), ""
)


@dataclass
class Loopback:
    """One login node and one laptop."""

    folder: Path
    name: str = field(default_factory=lambda: f"login-{secrets.token_hex(4)}")
    """As the laptop's ~/.ssh/config calls it."""
    port: int = 0
    sshd: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        """There."""
        return self.folder / "home there"

    @property
    def slurm(self) -> FakeSlurm:
        return FakeSlurm(self.folder / "slurm")

    @property
    def runs(self) -> Path:
        return self.home / "내 runs"

    @property
    def environment(self) -> dict[str, str]:
        """The laptop's."""
        return {
            "PATH": f"{self.folder / 'laptop'}:{os.environ['PATH']}",
            "HPCDL_RUNS": str(self.folder / "runs here"),
        }

    def start(self) -> None:
        for folder in (self.home, self.folder / "laptop"):
            folder.mkdir(parents=True)
        self.slurm.set()
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True
            )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._write_laptop()
        self._write_node()
        self.serve()

    def serve(self) -> None:
        """Starts sshd, and waits until it listens."""
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        with (self.folder / "sshd.log").open("ab") as log:
            self.sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", self.folder / "sshd_config"], stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline and self.sshd.poll() is None, self.log()
                time.sleep(0.02)

    def stop(self) -> None:
        """The host is away: nothing listens, and no connection is left."""
        subprocess.run(
            [self.folder / "laptop" / "ssh", "-O", "exit", "-o", f"ControlPath={self.socket}", self.name],
            capture_output=True,
            check=False,
        )
        if self.sshd is not None:
            self.sshd.terminate()
            self.sshd.wait()

    @property
    def socket(self) -> str:
        from hpcdl.launch.remote.connection import Connection

        (path,) = [each for each in Connection(self.name).options if each.startswith("ControlPath=")]
        return path.partition("=")[2]

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text()

    @property
    def logins(self) -> int:
        """How many connections were let in."""
        return self.log().count("Accepted publickey")

    def words(self) -> list[str]:
        """What makes a launch go there."""
        return ["cluster=slurm", f"cluster.login_host={self.name}", f"cluster.login_dir='{self.runs}'",
                f"cluster.login_python={sys.executable}"]  # fmt: skip

    def profile(self, text: str) -> None:
        """More of what a login shell there reads."""
        with (self.home / ".bash_profile").open("a") as file:
            file.write(textwrap.dedent(text))

    def _write_laptop(self) -> None:
        config = self.folder / "config"
        config.write_text(
            f"Host {self.name}\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f'  IdentityFile "{self.folder / "user"}"\n  IdentitiesOnly yes\n'
            f'  UserKnownHostsFile "{self.folder / "known"}"\n  GlobalKnownHostsFile none\n'
        )
        public = " ".join((self.folder / "host.pub").read_text().split()[:2])
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {public}\n")
        wrapper = self.folder / "laptop" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F "{config}" "$@"\n')
        wrapper.chmod(0o755)

    def _write_node(self) -> None:
        session = self.folder / "session"
        session.write_text(
            "#!/bin/bash\n"
            f'exec env -i HOME="{self.home}" USER="$USER" TERM="$TERM" SHELL=/bin/bash PATH=/usr/bin:/bin \\\n'
            '    bash -c "$SSH_ORIGINAL_COMMAND"\n'
        )
        session.chmod(0o755)
        self.profile(f'export PATH="{BIN}:$PATH" FAKE_SLURM="{self.slurm.folder}" HPCDL_SLURM_PATIENCE_S=0\n')
        (self.folder / "allowed").write_text((self.folder / "user.pub").read_text())
        (self.folder / "sshd_config").write_text(
            f'Port {self.port}\nListenAddress 127.0.0.1\nHostKey "{self.folder / "host"}"\n'
            f'AuthorizedKeysFile "{self.folder / "allowed"}"\nForceCommand "{session}"\n'
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"PermitRootLogin prohibit-password\nPidFile none\nLogLevel VERBOSE\nAcceptEnv none\n"
        )
