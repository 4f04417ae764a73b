"""The folder of a run's checkpoints: what comes into it, what is kept, what is taken away. Rank 0 alone.

    step-00000100/                  a whole checkpoint
    .tmp-step-100-<try>/            one that is being written, or was when its try was killed
    .tmp-gone-step-00000080-<try>/  one that is being taken away

A checkpoint comes and goes by one rename each: whoever reads finds all of it or nothing, whenever the writer is killed.
A try that lives on where nobody sees it (its node was cut off the network, and Slurm has started another) publishes
nothing more, and takes nothing away (hpcdl.runs.fence).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpcdl.errors import SupersededError
from hpcdl.runs import fence
from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir, now
from hpcdl.spec import TrainerSpec
from hpcdl.spec.checkpoint import TRAINER, Found, folders, kept, look, name_of, seal, step_of
from hpcdl.worker.process import Process

TEMPORARY = ".tmp-"


class Keeper:
    """What a run's checkpoints are put away and kept by.

    Two threads of one process may call it: a checkpoint comes from the one that writes, a held-out loss from the one
    that trains.
    """

    def __init__(self, run: RunDir, who: Process, trainer: TrainerSpec) -> None:
        """Takes what it keeps.

        Args:
            run: whose checkpoints.
            who: this rank; rank 0 but for `token`, which it gets from rank 0.
            trainer: how many to keep.
        """
        self._run = run
        self._who = who
        self._keep_last = trainer.keep_last
        self._keep_best = trainer.keep_best
        self._lock = threading.RLock()
        self._known: dict[str, Found] = {}
        """Whole ones, by their folders' names."""
        self._heldout: dict[int, float] = {}
        """By step."""
        self._published = -1
        """The last step that this process has put there."""
        self.token = f"{who.attempt}-{who.restart}-{secrets.token_hex(4)}"
        """This try; the same on all ranks once they have agreed on where to begin."""
        self.passed_over: frozenset[str] = frozenset()
        """Names of newer ones that are damaged: they go when there is a newer whole one again."""

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self._run.checkpoints

    def temporary(self, step: int) -> Path:
        """Where a checkpoint is written; any rank."""
        return self.folder / f"{TEMPORARY}step-{step}-{self.token}"

    def clean(self) -> None:
        """Takes away what killed tries left half-written."""
        for path in self.folder.glob(f"{TEMPORARY}*"):
            if self.token not in path.name:
                shutil.rmtree(path, ignore_errors=True)

    def publish(self, temporary: Path, record: Mapping[str, Any]) -> None:
        """Makes a checkpoint whose files are all on disk one that readers see.

        Args:
            temporary: where its files are.
            record: trainer.json, without seal.

        Raises:
            OSError: it can't be written; what was there before is as it was.
            SupersededError: another try has taken the run over.
        """
        step = int(record["totals"]["step"])
        path = self.folder / name_of(step)
        with self._lock:
            fence.must_hold(self._run, self._who.attempt, f"the checkpoint of step {step}")
            full = {**record, "saved": now(), "heldout_loss": self._heldout.get(step)}
            write_json(temporary / TRAINER, seal(full))
            fsync(temporary)
            if path.exists():  # a damaged one that was passed over
                path.rename(self._gone(path))
            temporary.rename(path)
            fsync(self.folder)
            self._published = step
            self.passed_over -= {path.name}
            self._known.pop(path.name, None)

    def drop(self, temporary: Path) -> None:
        """Takes away what can't be finished: its room may be all that is missing for the next one."""
        shutil.rmtree(temporary, ignore_errors=True)

    def note(self, step: int, heldout_loss: float) -> None:
        """Notes the held-out loss of a step in its checkpoint's record, now or once it is there."""
        with self._lock:
            self._heldout[step] = heldout_loss
            path = self.folder / name_of(step)
            if not path.is_dir() or not self._holds():
                return
            try:
                record = json.loads((path / TRAINER).read_bytes())
                if record.get("heldout_loss") != heldout_loss:
                    write_json(path / TRAINER, seal({**record, "heldout_loss": heldout_loss}))
            except (OSError, ValueError, AttributeError) as error:
                # Not worth the training's end: the checkpoint is as good without.
                message = f"{path.name}: its held-out loss can't be noted: {error}"
                self._run.event("warning", message=message)
                return
            known = self._known.get(path.name)
            if known is not None:
                self._known[path.name] = dataclasses.replace(known, heldout_loss=heldout_loss)
        self.prune()

    def prune(self) -> None:
        """Takes away what need not be kept any more: nothing before this try has put a newer one there."""
        with self._lock:
            if self._published < 0 or not self._holds():
                return
            present = folders(self.folder)
            whole = [found for path in present if (found := self._whole(path)) is not None]
            stay = kept(whole, self._keep_last, self._keep_best)
            for path in present:
                # Newer ones that nobody has passed over are not this try's business.
                ours = step_of(path) <= self._published or path.name in self.passed_over
                if ours and path.name not in stay:
                    self._take_away(path)
        # Outside of the lock: large files take their time.
        for path in self.folder.glob(f"{TEMPORARY}gone-*-{self.token}"):
            shutil.rmtree(path, ignore_errors=True)

    def _whole(self, path: Path) -> Found | None:
        """The checkpoint in a folder, looked at once a try."""
        if path.name in self.passed_over:
            return None
        found = self._known.get(path.name)
        if found is None and isinstance(seen := look(path), Found):
            found = self._known[path.name] = seen
        return found

    def _take_away(self, path: Path) -> None:
        self._known.pop(path.name, None)
        with contextlib.suppress(OSError):
            path.rename(self._gone(path))

    def _gone(self, path: Path) -> Path:
        return self.folder / f"{TEMPORARY}gone-{path.name}-{secrets.token_hex(2)}-{self.token}"

    def _holds(self) -> bool:
        try:
            fence.must_hold(self._run, self._who.attempt, "")
        except (SupersededError, OSError):  # unknown for now: nothing that can't wait is changed
            return False
        return True


def fsync(path: Path) -> None:
    """Has a folder's names, or a file's content, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def missing(folder: Path, sizes: Mapping[str, int]) -> Iterable[str]:
    """Which of the files that ranks say they have written are not there as this node sees it."""
    for name, size in sizes.items():
        try:
            seen = (folder / name).stat().st_size
        except FileNotFoundError:
            seen = -1
        if seen != size:
            yield name
