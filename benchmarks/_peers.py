"""The other launchers, each in its own virtual environment below the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent


def cache() -> Path:
    """Where the environments are: outside the checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpcdl-bench"


def free_port() -> int:
    """A port of loopback that nobody listens on, below those that the kernel gives to outgoing connections.

    One that the kernel gave us could be given to another program's connection before ours has bound it.
    """
    for port in random.sample(range(10_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port among a hundred between 10000 and 32000")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A virtual environment and what is installed in it."""

    name: str
    requirements: tuple[str, ...]
    sources: tuple[Path, ...] = ()
    """Files and folders that the requirements point to: a change in them makes the environment stale."""
    over_this_python: bool = False
    """This Python's own packages are seen in it: a peer then trains with the very same torch."""

    @property
    def bin(self) -> Path:
        return cache() / self.name / "bin"

    @property
    def _stamp(self) -> Path:
        return cache() / self.name / ".made-of"

    def is_current(self) -> bool:
        """Whether it is installed, and from what the requirements say now."""
        return self._stamp.exists() and self._stamp.read_text() == self._fingerprint()

    def make(self) -> str | None:
        """Makes it, or brings it up to date.

        Returns:
            Why it could not be made, in pip's words; None if it was.
        """
        subprocess.run([sys.executable, "-m", "venv", cache() / self.name], check=True)
        if self.over_this_python:
            self._see_this_python()
        options = ("--quiet", "--disable-pip-version-check")
        command = [self.bin / "pip", "install", *options, *self.requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return " ".join(errors) or done.stderr.strip()[-300:]
        self._stamp.write_text(self._fingerprint())
        return None

    def _see_this_python(self) -> None:
        ask = (self.bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        mine = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
        # By a .pth, not by --system-site-packages: that shows the Python below this one, where this is a venv.
        (mine / "beneath.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def _fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.requirements).encode())
        if self.over_this_python:
            digest.update(sysconfig.get_path("purelib").encode())
        for source in self.sources:
            for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
                if file.is_file() and "__pycache__" not in file.parts:
                    digest.update(str(file.relative_to(CHECKOUT)).encode() + file.read_bytes())
        return digest.hexdigest()


HPCDL = Environment(
    name="hpcdl",
    requirements=(str(CHECKOUT),),
    sources=tuple(CHECKOUT / part for part in ("hpcdl", "conf", "slurm", "pyproject.toml")),
)
"""hpcdl as `pip install hpcdl` gives it to a login node: a wheel, the base dependencies, no torch."""

PEERS = (
    Environment(name="torchx", requirements=("torchx==0.7.*",)),
    Environment(name="submitit", requirements=("submitit==1.5.*",)),
    Environment(
        name="hydra-submitit",
        requirements=("hydra-submitit-launcher==1.2.*", "hydra-core==1.3.*", "omegaconf==2.3.*"),
    ),
    # leptonai 0.47 has no leptonai.api.v1, which NeMo-Run 0.11 imports at its start.
    Environment(name="nemo-run", requirements=("nemo-run==0.11.*", "leptonai<0.47")),
)
LIGHTNING = Environment(name="lightning", requirements=("lightning==2.6.*",), over_this_python=True)
"""The other frameworks of training.py come with hpcdl's train extra."""
LAUNCHERS = (HPCDL, *PEERS)


def prepare(*, setup: bool, say: bool = True, wanted: Sequence[Environment] = LAUNCHERS) -> dict[str, str]:
    """Sees to the environments.

    Args:
        setup: install what is missing or stale; hpcdl's own is brought up to date in any case.
        wanted: which.
        say: print what is being installed.

    Returns:
        For each environment that can't be used, the reason.
    """
    missing = {}
    for environment in wanted:
        if environment.is_current():
            continue
        if not setup and environment is not HPCDL:
            missing[environment.name] = "not installed: run with --setup"
            continue
        if say:
            print(f"installing {environment.name}: {' '.join(environment.requirements)}", file=sys.stderr)
        fault = environment.make()
        if fault:
            missing[environment.name] = f"could not be installed here: {fault}"
    return missing
