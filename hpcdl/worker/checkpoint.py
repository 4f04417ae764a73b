"""Checkpoints: `step-00000100/`, written under another name and renamed when whole; exact resume.

    .metadata, __<rank>_0.distcp   torch.distributed.checkpoint: trained weights, buffers, optimizer
    rng-00000.pt                   random states of one rank
    trainer.json                   step, totals, the data's digest, every file's size; written last

The learning rate is a function of the step and the batches are one of (seed, step): the step is their
state, so the same run goes on with the same batches on any number of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hpcdl.distributed.decoder import Stage, named_parameters
from hpcdl.distributed.engine import Engine
from hpcdl.errors import HpcdlError
from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir
from hpcdl.worker import rng
from hpcdl.worker.control import agree_on_start
from hpcdl.worker.process import Process

# torch.distributed.checkpoint takes half a second to import: not before the first step.

TRAINER = "trainer.json"
TEMPORARY = ".tmp-step-"
OWN = "own."
"""Names of what only one strategy needs: others resume without it."""


@dataclass(slots=True, kw_only=True)
class Totals:
    """What the loop counts over the whole run, all tries together."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Input tokens trained on, padding left out."""
    train_s: float = 0.0
    """Seconds spent in steps, without evaluation, checkpoints and start-up."""
    peak_memory_bytes: int = 0
    """Highest of any rank."""


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    totals: Totals
    world_size: int
    data_digest: str
    seed: int


def name_of(step: int) -> str:
    """The folder's name: `step-00000100`."""
    return f"step-{step:08d}"


def read(path: Path) -> Found | None:
    """The checkpoint in `path` if it is whole: every file there, as long as when it was written."""
    try:
        record = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, json.JSONDecodeError, KeyError):
        return None
    if not whole:
        return None
    totals = Totals(**record["totals"])
    return Found(path, totals.step, totals, record["world_size"], record["data_digest"], record["seed"])


def newest(run: RunDir) -> Found | None:
    """The newest whole checkpoint; a torn one is passed over, and an event says so."""
    for path in sorted(run.checkpoints.glob("step-*"), reverse=True):
        found = read(path)
        if found is not None:
            return found
        run.event("warning", message=f"checkpoint {path.name} is not whole: passed over")
    return None


class Checkpointer:
    """Saves and loads a run's checkpoints; every method is called by all ranks together, unless it says so."""

    def __init__(
        self, run: RunDir, who: Process, engine: Engine, *,
        keep_last: int, seed: int, data_digest: str,
    ) -> None:  # fmt: skip
        self._run = run
        self._who = who
        self._engine = engine
        self._keep_last = keep_last
        self._seed = seed
        self._data_digest = data_digest

    def clean(self) -> None:
        """Takes away what killed tries left half-written. Rank 0 alone, before anyone saves."""
        for path in self._run.checkpoints.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def save(self, totals: Totals) -> None:
        """Writes a checkpoint of this step; it exists for readers only once it is whole and on disk.

        Rank 0 renames; the others may go on meanwhile, since all their parts are written.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        path = self._run.checkpoints / name_of(totals.step)
        temporary = path.with_name(f"{TEMPORARY}{totals.step}-{self._who.attempt}-{self._who.restart}")
        temporary.mkdir(parents=True, exist_ok=True)
        random_states = temporary / f"rng-{self._who.rank:05d}.pt"
        rng.save(random_states)
        _fsync(random_states)
        # Its last collective tells rank 0 that every rank has written (and fsynced) its part.
        save(self._engine.state(), storage_writer=FileSystemWriter(temporary, sync_files=True))
        if self._who.is_first:
            files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
            record = {
                "totals": asdict(totals),
                "world_size": self._who.world_size,
                "data_digest": self._data_digest,
                "seed": self._seed,
                "files": files,
            }
            write_json(temporary / TRAINER, record)
            _fsync(temporary)
            if path.exists():  # a torn one that was passed over, or the same step saved by an earlier try
                shutil.rmtree(path)
            temporary.rename(path)
            _fsync(path.parent)
            self._run.event("checkpoint", step=totals.step)
            self._prune(path.name)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self._run.checkpoints / name_of(step)

    def load(self, found: Found) -> None:
        """Sets weights, optimizer and random states to the checkpoint's.

        With another number of ranks than it was saved by, each rank seeds anew from (seed, step, rank).

        Raises:
            HpcdlError: the data is no longer what it was: resuming would not continue the same run.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        if found.data_digest != self._data_digest:
            raise HpcdlError(
                f"the data has changed since {found.path.name} was saved (other files, tokenizer or Python):"
                " put it back as it was, or launch a new run with force=true"
            )
        state, keys = self._engine.state(), saved_keys(found.path)
        missing = [key for key in state if key not in keys and not key.startswith(OWN)]
        if missing:
            raise HpcdlError(
                f"{found.path.name} lacks {len(missing)} of {len(state)} tensors, {missing[0]} among them:"
                " it is of another model, fine-tuning method or optimizer"
            )
        load({key: state[key] for key in state if key in keys}, storage_reader=FileSystemReader(found.path))
        self._engine.restored(found.step, keys)
        if found.world_size == self._who.world_size:
            rng.load(found.path / f"rng-{self._who.rank:05d}.pt")
        else:
            rng.seed_all(found.seed, self._who.rank, found.step)

    def _prune(self, newest_name: str) -> None:
        # Later ones than this were torn, and passed over at the resume.
        later = [p for p in self._run.checkpoints.glob("step-*") if p.name > newest_name]
        kept = sorted(p for p in self._run.checkpoints.glob("step-*") if p.name <= newest_name)
        for old in later + kept[: -self._keep_last]:
            shutil.rmtree(old, ignore_errors=True)


def saved_keys(path: Path) -> frozenset[str]:
    """Names of the tensors in a checkpoint."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return frozenset(FileSystemReader(path).read_metadata().state_dict_metadata)


def load_weights(path: Path, model: nn.Module) -> None:
    """Sets a whole model's trained parameters to a checkpoint's, whoever wrote it. One rank alone."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {
        f"model.{name}": parameter.detach()
        for name, parameter in named_parameters(Stage(model)).items()
        if parameter.requires_grad
    }
    load(state, storage_reader=FileSystemReader(path), no_dist=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def choose(run: RunDir, who: Process, fingerprint: Tensor, device: torch.device) -> Found | None:
    """The checkpoint that all ranks resume from: rank 0 looks, the others take its word.

    In the same collective it is checked that all ranks start from the same weights.

    Args:
        run: the run.
        who: this rank.
        fingerprint: of this rank's weights as loaded (`control.fingerprint`).
        device: where collectives take their tensors.

    Raises:
        HpcdlError: they don't, or a node doesn't see the checkpoint.
    """
    found = newest(run) if who.is_first else None
    step = agree_on_start(found.step if found else -1, fingerprint, device)
    if step < 0 or who.is_first:
        return found
    path = run.checkpoints / name_of(step)
    seen = read(path)
    if seen is None:
        raise HpcdlError(f"{who.node} can't read {path}, which rank 0 can: is the disk shared by all nodes?")
    return seen
