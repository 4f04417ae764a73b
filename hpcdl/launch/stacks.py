"""Where ranks are, by the stacks that they have written down, and which of them the others wait for."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir

_PEERS_LIMIT_S = 5.0
"""How long to wait for what the other nodes' agents have seen: they count with their own clocks."""


_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_WAITS = re.compile(
    r"torch/distributed/|torch/autograd/graph\.py:.*_engine_run_backward|worker/control\.py:.* (?:wait|arrive)"
)
"""Innermost frames of a rank that waits for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Where one silent rank is."""

    rank: int
    node: str
    step: int
    """Steps done."""
    phase: str
    state: str
    """The kernel's letter for the process: S sleeps, R runs, D waits for a disk, T is stopped; empty: gone."""
    frames: tuple[str, ...]
    """The main thread's, innermost first: `worker/loop.py:12 train_step`; none: it gave no answer."""

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks."""
        return bool(self.frames) and bool(_WAITS.search(self.frames[0]))

    @property
    def where(self) -> str:
        """In words."""
        if self.state == "T":
            return "stopped (SIGSTOP)"
        if self.state in ("", "Z"):
            return "gone"
        if self.state == "D":
            return f"waiting for a disk{f' in {self.frames[0]}' if self.frames else ''}"
        if not self.frames:
            return "without an answer"
        return f"{'waiting ' if self.waits else ''}in {self.frames[0]}"


def gather(run: RunDir, attempt: str, restart: int, node: int, nodes: int, own: Sequence[Look]) -> list[Look]:
    """Tells the other nodes' agents where this node's ranks are; where all ranks are, as far as it was told.

    Args:
        run: the run.
        attempt: the try.
        restart: restarts in place before it.
        node: this node's number.
        nodes: how many there are.
        own: this node's ranks.
    """
    stem = f"hang-try{attempt}-restart{restart}"
    write_json(run.errors / f"{stem}-node{node}.looks", [asdict(look) for look in own])
    deadline = time.monotonic() + _PEERS_LIMIT_S
    files = list(run.errors.glob(f"{stem}-node*.looks"))
    while len(files) < nodes and time.monotonic() < deadline:
        time.sleep(0.1)
        files = list(run.errors.glob(f"{stem}-node*.looks"))
    looks = [_look(plain) for file in files for plain in json.loads(file.read_text(encoding="utf-8"))]
    return sorted(looks, key=lambda look: look.rank)


def _look(plain: Mapping[str, Any]) -> Look:
    return Look(**{**plain, "frames": tuple(plain["frames"])})


def differing(looks: Sequence[Look]) -> list[Look]:
    """The ranks that the others wait for; none where they are all alike, or it can't be told."""
    signs = (
        lambda look: look.state in ("T", "D", "Z", "") or not look.frames,
        lambda look: look.step < max(other.step for other in looks),
        lambda look: not look.waits,
    )
    for differs in signs:
        found = [look for look in looks if differs(look)]
        if 0 < len(found) < len(looks):
            return found
    places = Counter(look.frames[:5] for look in looks)
    (usual, count), *others = places.most_common()
    if others and count > others[0][1]:
        return [look for look in looks if look.frames[:5] != usual]
    return []


def together(looks: Sequence[Look]) -> dict[str, list[int]]:
    """Ranks that are at the same place, by it."""
    found: dict[str, list[int]] = {}
    for look in looks:
        found.setdefault(look.where, []).append(look.rank)
    return found


def in_words(ranks: Sequence[int]) -> str:
    """`ranks 0, 2, 3`."""
    named = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"


def main_thread(text: str) -> tuple[str, ...]:
    """The main thread's frames from what faulthandler wrote, innermost first, `worker/loop.py:12 run`.

    The main thread is the one that began in a module; faulthandler lists threads from the youngest to the oldest.
    """
    threads = _threads(text)
    return next((tuple(frames) for frames in threads if _is_main(frames)), tuple((threads or [[]])[-1]))


def is_whole(text: str) -> bool:
    """Whether faulthandler has come to the main thread, which is the last."""
    return any(map(_is_main, _threads(text)))


def _is_main(frames: Sequence[str]) -> bool:
    return bool(frames) and frames[-1].endswith(("<module>", " _run_module_as_main"))


def _threads(text: str) -> list[list[str]]:
    threads: list[list[str]] = []
    for line in text.splitlines():
        if line.endswith("(most recent call first):"):
            threads.append([])
        elif threads and (frame := _FRAME.match(line)):
            path, number, name = frame.groups()
            threads[-1].append(f"{_short(path)}:{number} {name}")
    return threads


def _short(path: str) -> str:
    """`torch/distributed/x.py` of a package, else the last two parts."""
    inside = path.rpartition("site-packages/")
    return inside[2] if inside[1] else "/".join(Path(path).parts[-2:])


def read(path: Path) -> str:
    """A file's text; none where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def state(pid: int) -> str:
    """The kernel's letter for a process; empty where it is gone."""
    return (read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or [""])[0]
