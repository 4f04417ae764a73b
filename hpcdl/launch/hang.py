"""A hang told from slow progress: each node's agent listens to its own ranks, and asks them where they are.

Slow is a step that takes long; a hang is one that takes `monitor.hang_factor` times as long as the median step of
this try. What has no median (the start, the first step with its compilation, an evaluation, a checkpoint) has
`monitor.hang_quiet_s`. Ranks that wait in a collective are silent too: who has not come there is told by the
stacks, which each rank's faulthandler writes from a signal handler in C, also while Python itself can't run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hpcdl.launch import causes, stacks, torchrun
from hpcdl.launch.causes import Cause
from hpcdl.launch.child import Torchrun
from hpcdl.launch.place import Place
from hpcdl.launch.stacks import Look
from hpcdl.runs import beats, kinds
from hpcdl.runs.beats import Beat
from hpcdl.runs.store import RunDir

LOOK_EVERY_S = 1.0
TORCHRUN_LIMIT_S = 30.0
"""How long torchrun may take to see that its workers were ended; then it hangs itself, and is ended too."""
_ENOUGH = 3
"""Timed steps that make a median."""
_LONGEST_LOOK_S = 5.0
"""An agent that was itself stopped (scontrol suspend, a laptop's lid) doesn't take that time for its ranks'."""
_DUMP_LIMIT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When silence is a hang (`monitor`)."""

    factor: float
    """Times the median step; 0: nobody listens."""
    min_s: float
    """But not before, in seconds."""
    quiet_s: float
    """Where there is no median, in seconds."""

    @classmethod
    def of(cls, monitor: Mapping[str, Any]) -> Limits:
        """From spec.yaml's `monitor` section; one of an older version has no such keys: nobody listens."""
        return cls(
            factor=float(monitor.get("hang_factor", 0)),
            min_s=float(monitor.get("hang_min_s", 0)),
            quiet_s=float(monitor.get("hang_quiet_s", 0)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """Ranks of this node that have been silent for too long."""

    silent_s: float
    limit_s: float
    median_s: float | None
    beats: tuple[Beat, ...]
    """All of the node's ranks."""

    @property
    def restart(self) -> int:
        """Restarts in place before it."""
        return max(beat.restart for beat in self.beats)

    @property
    def words(self) -> str:
        """What was seen and why it is taken for a hang."""
        usual = "" if self.median_s is None else f"; the median step takes {self.median_s:.3g} s"
        steps = max(beat.step for beat in self.beats)
        phase = next((beat.phase for beat in self.beats if beat.phase != "step"), "step")
        what = "no step" if phase == "step" else f"no sign from the {phase}"
        return f"{what} for {self.silent_s:.0f} s after step {steps} (limit {self.limit_s:.0f} s{usual})"


@dataclass(slots=True)
class _Heard:
    """What is known of one rank's signs."""

    beat: Beat
    silent_s: float = 0.0
    took: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    """Seconds a step, by looks; one that saw many steps is enough for a median."""


class Watch:
    """Listens to this node's ranks.

    Args:
        folder: of the node's own, for the ranks' signs.
        limits: when silence is a hang.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._heard: dict[int, _Heard] = {}
        self._looked = time.monotonic()
        self._step: int | None = None

    def step(self, restart: int | None = None) -> int | None:
        """The last step that a rank of this node has come to; None where none has given a sign.

        Once the folder is gone, as it was when it was last asked for.

        Args:
            restart: after so many restarts in place; None: after the last one.
        """
        said = beats.listen(self._folder, restart)
        if said:
            self._step = max(beat.step for beat in said)
        elif restart is not None and beats.listen(self._folder):
            return 0  # it ended before its first sign
        return self._step

    def look(self) -> Hang | None:
        """What there is to say by now; asks its ranks at most once a second."""
        now = time.monotonic()
        if not self._limits.factor or now - self._looked < LOOK_EVERY_S:
            return None
        passed, self._looked = min(now - self._looked, _LONGEST_LOOK_S), now
        return self.hear(beats.listen(self._folder), passed)

    def hear(self, said: Sequence[Beat], passed_s: float) -> Hang | None:
        """Takes in the signs after `passed_s` seconds more; a hang, once any rank has been silent too long."""
        for beat in said:
            heard = self._heard.get(beat.rank)
            if heard is None or heard.beat.pid != beat.pid:
                self._heard[beat.rank] = _Heard(beat)
                continue
            heard.silent_s += passed_s
            if beat.count == heard.beat.count:
                continue
            steps = beat.step - heard.beat.step
            if steps > 0 and heard.beat.phase == beat.phase == "step":
                heard.took.extend([heard.silent_s / steps] * min(steps, _ENOUGH))
            heard.beat, heard.silent_s = beat, 0.0
        for heard in self._heard.values():
            limit, median = self._limit(heard)
            if heard.silent_s > limit:
                self._heard = {}
                return Hang(silent_s=heard.silent_s, limit_s=limit, median_s=median, beats=tuple(said))
        return None

    def _limit(self, heard: _Heard) -> tuple[float, float | None]:
        if heard.beat.phase != "step" or len(heard.took) < _ENOUGH:
            return self._limits.quiet_s, None
        median = statistics.median(heard.took)
        return max(self._limits.min_s, self._limits.factor * median), median

    def dump(self, hang: Hang, run: RunDir, attempt: str, node: str) -> list[Look]:
        """Has every rank of this node write its stacks into the run directory; where each of them is.

        `errors/try<t>-restart<n>-rank<r>-stacks.txt`.
        """
        for beat in hang.beats:
            with contextlib.suppress(OSError):
                beats.stacks_file(self._folder, beat.rank).write_bytes(b"")  # somebody may have asked before
                os.kill(beat.pid, signal.SIGUSR1)
        deadline = time.monotonic() + _DUMP_LIMIT_S
        texts = [""] * len(hang.beats)
        while time.monotonic() < deadline:
            texts = [stacks.read(beats.stacks_file(self._folder, beat.rank)) for beat in hang.beats]
            silent = [b for b, text in zip(hang.beats, texts, strict=True) if not stacks.is_whole(text)]
            if all(stacks.state(beat.pid) in ("T", "Z", "") for beat in silent):
                break
            time.sleep(0.1)
        looks = []
        for beat, text in zip(hang.beats, texts, strict=True):
            if text:
                name = f"try{attempt}-restart{beat.restart}-rank{beat.rank}-stacks.txt"
                shutil.copyfile(beats.stacks_file(self._folder, beat.rank), run.errors / name)
            looks.append(
                Look(
                    rank=beat.rank,
                    node=node,
                    step=beat.step,
                    phase=beat.phase,
                    state=stacks.state(beat.pid),
                    frames=stacks.main_thread(text),
                )
            )
        return looks


class Guard:
    """An agent's watch over its ranks, and what it does about a hang: everything is written down, then they end.

    Whether they start anew is decided as after any other failure (hpcdl.launch.progress).

    Args:
        run: the run.
        place: which part of which job this is.
        attempt: the try.
        folder: of the node's own; it is there as long as the try goes on.
    """

    def __init__(self, run: RunDir, place: Place, attempt: str, folder: Path) -> None:
        self._run, self._place, self._attempt = run, place, attempt
        monitor = torchrun.plain_spec(run).get("monitor", {})
        self.watch = Watch(folder, Limits.of(monitor))
        self.environment = {beats.FOLDER: str(folder)}
        """For the ranks: where they give their signs."""
        self._ended: tuple[int, ...] = ()
        self._ended_at = 0.0
        self.has_ended_torchrun = False

    def look(self, child: Torchrun, say: Callable[[str], None]) -> None:
        """Ends the ranks if they hang; to be called several times a second."""
        if self._ended and time.monotonic() > self._ended_at + TORCHRUN_LIMIT_S:
            if any(stacks.state(pid) == "Z" for pid in self._ended):
                say("torchrun takes no notice of its workers' end; ending it")
                self.has_ended_torchrun = True
                child.kill()
            self._ended = ()
        found = self.watch.look()
        if found is None:
            return
        say(f"hang: {found.words}; asking all ranks where they are")
        place, restart = self._place, found.restart
        own = self.watch.dump(found, self._run, self._attempt, place.name)
        looks = stacks.gather(self._run, self._attempt, restart, place.node, len(place.nodes), own)
        why = cause(found, looks, place.name)
        causes.record(self._run, self._attempt, place.node, why, restart=restart, by="hang")
        if place.first:
            odd = stacks.differing(looks)
            self._run.event(
                kinds.HANG.lower(),
                message=why.message,
                ranks=[look.rank for look in odd],
                nodes=sorted({look.node for look in odd}),
                stacks=f"{self._run.errors}/try{self._attempt}-restart{restart}-rank*-stacks.txt",
            )
        say(f"{why.reason}; ending the workers")
        child.signal_workers(signal.SIGKILL)
        self._ended, self._ended_at = tuple(beat.pid for beat in found.beats), time.monotonic()


def cause(hang: Hang, looks: Sequence[Look], node: str) -> Cause:
    """The hang as the root cause of the try's end: earlier than what it leads to.

    Args:
        hang: what this node's agent has seen.
        looks: where all ranks are.
        node: this node, to blame where no rank differs.
    """
    odd = stacks.differing(looks)
    rest = [look for look in looks if look not in odd]
    said = [f"rank {look.rank} ({look.node}) {look.where}" for look in odd[:4]]
    for where, ranks in stacks.together(rest).items():
        said.append(f"{stacks.in_words(ranks)} {where}")
    since = datetime.now(UTC) - timedelta(seconds=hang.silent_s)
    first = odd[0] if odd else None
    return Cause(
        time=since.isoformat(timespec="milliseconds"),
        type=kinds.HANG,
        message=f"{hang.words}: {'; '.join(said)}",
        node=first.node if first else node,
        rank=first.rank if first else None,
        step=max(look.step for look in looks),
    )
