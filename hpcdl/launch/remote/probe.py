"""What the login node has, asked in one go before anything is sent; every fault of it, in the words of a config's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcdl.errors import ConfigError, Fault
from hpcdl.launch.remote import envelope
from hpcdl.launch.remote.connection import Connection, Done
from hpcdl.runs.away import Place

PACKAGES = {
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "submitit": "submitit",
    "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types",
    "yaml": "pyyaml",
    "rich": "rich",
    "jinja2": "jinja2",
    "psutil": "psutil",
}
"""What hpcdl needs there, as it is imported and as pip calls it. hpcdl itself is carried."""
_OLD = "import sys; sys.exit(sys.version_info < (3, 11))"
ROOM_BYTES = 32 * 2**20
"""Free on the disk of the runs: less doesn't hold a launch."""
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """The login node as it was found."""

    place: Place
    """With the folder absolute, and the Python that runs hpcdl."""
    codes: tuple[str, ...]
    """Digests of the code that is there, the newest first."""


def ask(connection: Connection, place: Place, *, write: bool) -> Login:
    """Asks the login node what it has.

    Args:
        connection: to it.
        place: as it was typed.
        write: make the folder of all runs, and try to write there; else only look.

    Raises:
        ConfigError: it lacks something; carries every fault.
        HostError: it could not be reached.
    """
    if shutil.which("rsync") is None:
        raise ConfigError([_fault("host", place.host, "rsync is not installed here, and carries the code there",
                                  "install rsync (apt install rsync)")])  # fmt: skip
    source = Path(__file__).with_name("probe_there.py").read_text(encoding="utf-8")
    arguments = envelope.words([source, place.folder, "write" if write else "look", *PACKAGES])
    old = f'"$py" -c {envelope.words([_OLD])} || {{ "$py" -V 2>&1; exit {envelope.OLD_PYTHON}; }}'
    script = f'cd\n{envelope.python(place.python)}{old}\nexec "$py" -c {arguments}'
    done = connection.capture(script, limit_s=LIMIT_S)
    faults = list(_faults(done, place))
    if faults:
        raise ConfigError(faults)
    found = json.loads(done.stdout)
    known = Place(host=place.host, folder=found["folder"], python=place.python or found["python"])
    return Login(place=known, codes=tuple(found["codes"]))


def _faults(done: Done, place: Place) -> Iterator[Fault]:
    python = place.python or "python3"
    if done.noise.strip():
        yield _fault("host", place.host,
                     f"its shell prints text before each command, which rsync can't read: {done.noise.strip()[:60]!r}",
                     "in ~/.bashrc there, print only in interactive shells: [[ $- == *i* ]] && echo …")  # fmt: skip
    if done.code == envelope.NO_PYTHON:
        yield _fault("python", place.python or "", f"there is no {python} on {place.host}",
                     "cluster.login_python=/path/of/python3.11, or a newer one")  # fmt: skip
        return
    if done.code == envelope.OLD_PYTHON:
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
        yield _fault("python", python, f"it is {' '.join(said) or 'no Python'} on {place.host}",
                     "cluster.login_python=/path/of/python3.11; or module load python in a profile there",
                     allowed="Python 3.11 or newer")  # fmt: skip
        return
    try:
        found = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.code}").splitlines()
        yield _fault(
            "python", python, f"it can't be run on {place.host}: {said[-1]}", f"ssh {place.host} {python} -V"
        )
        return
    yield from _lacks(found, place, python)


def _lacks(found: dict[str, object], place: Place, python: str) -> Iterator[Fault]:
    """What a node whose Python is right still lacks."""
    missing = found["missing"]
    assert isinstance(missing, list)
    if missing:
        names = [PACKAGES[name] for name in missing]
        yield _fault("python", python, f"it lacks {', '.join(names)} on {place.host}",
                     f"there: {python} -m pip install {' '.join(names)}; or cluster.login_python=… that has them",
                     allowed="a Python with hpcdl's dependencies (hpcdl itself is carried there)")  # fmt: skip
    if not found["rsync"]:
        yield _fault("host", place.host, "it has no rsync", "ask for rsync to be installed there")
    if not found["sbatch"]:
        yield _fault("host", place.host, "there is no sbatch on it: it is no login node of a Slurm cluster",
                     "the login node's name; or put sbatch on PATH in a login shell's profile there")  # fmt: skip
    free = found["free"]
    assert isinstance(free, int)
    if found["refused"]:
        yield _fault("dir", place.folder, f"nothing can be written there: {found['refused']}",
                     "cluster.login_dir=… of yours, on a disk that every node sees")  # fmt: skip
    elif free < ROOM_BYTES:
        yield _fault("dir", place.folder, f"its disk has {free // 2**20} MiB left",
                     "make room there, or cluster.login_dir=… on another disk", allowed="32 MiB at least")  # fmt: skip


def _fault(key: str, value: str, problem: str, fix: str, allowed: str = "") -> Fault:
    return Fault(key=f"cluster.login_{key}", value=value, problem=problem, allowed=allowed, fix=fix)
