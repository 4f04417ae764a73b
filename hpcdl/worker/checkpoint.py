"""Checkpoints: `step-00000100/`, written under another name and renamed when whole; exact resume.

    .metadata, __<rank>_0.distcp   torch.distributed.checkpoint: trained weights, buffers, optimizer
    rng-00000.pt                   random states of one rank
    trainer.json                   step, totals, the data's digest, every file's size and checksum; written last

writing.py writes the files, keeping.py makes them a checkpoint and takes old ones away, resume.py chooses the one to
go on from and verifies it, reading.py reads it.

The learning rate is a function of the step and the batches are one of (seed, step): the step is their
state, so the same run goes on with the same batches on any number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpcdl.distributed.engine import Engine
from hpcdl.errors import HpcdlError, UnsavedError
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.checkpoint import Found, Totals, Written, name_of, newest
from hpcdl.worker import rng
from hpcdl.worker.keeping import Keeper, missing
from hpcdl.worker.process import Process

# torch.distributed.checkpoint takes half a second to import: not before the first step.

OWN = "own."
"""Names of what only one strategy needs: others resume without it."""


@dataclass(slots=True, kw_only=True)
class Saving:
    """One checkpoint on its way to the disk."""

    totals: dict[str, Any]
    """As they were when it was due."""
    state: dict[str, Tensor]
    random_states: dict[str, Any]
    path: Path
    """Where it will lie once it is whole."""
    temporary: Path
    """Where it is written."""
    started: float
    """When it was due; perf_counter."""
    must: bool
    """Whether the training can't go on without it: it is the last one."""
    size: int = 0
    """Bytes written by all ranks; rank 0 only."""
    stalled_s: float = 0.0
    """Seconds that training has waited because of it."""
    copied: Event = field(default_factory=Event)
    """Whether the state may change."""
    in_background: bool = False
    """Whether training goes on while it is written."""
    future: Future[None] | None = None
    """Its end, where it is written in the background."""


class Checkpointer:
    """Saves and loads a run's checkpoints; every method is called by all ranks together, unless it says so.

    With `trainer.checkpoint_async` a thread writes while training goes on. It copies this rank's share
    during the next step's passes, which change no weight; `settle`, called before what changes them, waits
    for the copy; for the writing itself where the engine's state is too large for a copy. One save is under way
    at a time.

    A disk that takes a checkpoint not (full, a quota, an I/O error) ends the training only where it was to be the
    last one: else all ranks drop it together, an event says so, and the next one is tried when it is due.
    """

    def __init__(
        self, run: RunDir, who: Process, engine: Engine, spec: ExperimentSpec, keeper: Keeper, *,
        data_digest: str, first_step: int = 0,
    ) -> None:  # fmt: skip
        """Takes what it saves.

        Args:
            run: where checkpoints go.
            who: this rank.
            engine: what is saved.
            spec: the experiment.
            keeper: puts them away.
            data_digest: tells the data from other data.
            first_step: the step that the run began from: above 0 where it continues another one.
        """
        self._run = run
        self._who = who
        self._engine = engine
        self._spec = spec
        self._keeper = keeper
        self._data_digest = data_digest
        self._first_step = first_step
        self._under: Saving | None = None
        self._buffers: dict[Any, Tensor] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        trainer = spec.trainer
        if trainer.checkpoint_async and trainer.checkpoint_every:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            # Two threads in one gloo group abort the process.
            self._group = dist.new_group(backend="gloo")

    def clean(self) -> None:
        """Takes away what killed tries left half-written. Rank 0 alone, before anyone saves."""
        self._keeper.clean()

    def note(self, step: int, heldout_loss: float) -> None:
        """Tells what the model of a step is worth; any rank, rank 0 writes it into that step's checkpoint."""
        if self._who.is_first:
            self._keeper.note(step, heldout_loss)

    def save(self, totals: Totals, *, wait: bool = True) -> None:
        """Writes a checkpoint of this step; it exists for readers only once it is whole and on disk.

        Args:
            totals: the counts of this step.
            wait: it is the last one: return only once it is written. Else it may be written in the background
                (where `trainer.checkpoint_async` allows it), and `settle` must be called before the state
                changes.

        Raises:
            UnsavedError: it is the last one, and the disk doesn't take it.
        """
        started = time.perf_counter()
        self.drain()
        saving = Saving(
            totals=asdict(totals), state=self._engine.state(), random_states=rng.states(), must=wait,
            path=self._run.checkpoints / name_of(totals.step), temporary=self._keeper.temporary(totals.step),
            started=started,
        )  # fmt: skip
        if wait or self._thread is None:
            self._ended(saving, lambda: self._write(saving, None))
            return
        self._under, saving.in_background = saving, True
        after = torch.cuda.current_stream().record_event() if self._engine.device.type == "cuda" else None
        saving.future = self._thread.submit(self._in_background, saving, after)
        saving.stalled_s = time.perf_counter() - started

    def settle(self) -> None:
        """Waits until what is being saved has been copied. To be called before the state changes."""
        saving = self._under
        if saving is None:
            return
        started = time.perf_counter()
        saving.copied.wait()
        saving.stalled_s += time.perf_counter() - started
        assert saving.future is not None
        if saving.future.done():
            self.drain()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written on this rank; it alone may be asked."""
        saving = self._under
        return saving is None or saving.future is None or saving.future.done()

    def drain(self) -> None:
        """Waits until nothing is being saved any more."""
        saving, self._under = self._under, None
        if saving is not None and saving.future is not None:
            self._ended(saving, saving.future.result)

    def _in_background(self, saving: Saving, after: Any) -> None:
        """The thread's part of a save."""
        try:
            from hpcdl.worker.staging import StagedPlanner

            if after is not None:
                torch.cuda.set_device(self._engine.device)  # each thread has its own
            staged = self._engine.staged
            self._write(saving, StagedPlanner(self._buffers, saving.copied, after) if staged else None)
        finally:
            saving.copied.set()  # after a failure nobody must wait

    def _write(self, saving: Saving, planner: Any) -> None:
        """Writes all of it, on all ranks, or nothing: what one can't write, all drop."""
        from torch.distributed.checkpoint.state_dict_saver import save

        from hpcdl.worker.staging import PassingSaver
        from hpcdl.worker.writing import Writer

        try:
            save(
                saving.state,
                storage_writer=Writer(
                    saving.temporary, saving.random_states, lambda files: self._publish(saving, files)
                ),
                planner=planner or PassingSaver(self._engine.let_go),
                process_group=self._group,
            )
        except BaseException:  # which torch's CheckpointException is
            if self._who.is_first:  # every rank has ended its writing
                self._keeper.drop(saving.temporary)
            raise
        if self._who.is_first:
            took = time.perf_counter() - saving.started
            self._run.event(
                "checkpoint",
                step=saving.totals["step"],
                seconds=round(took, 4),
                stalled_s=round(saving.stalled_s if saving.in_background else took, 4),
                bytes=saving.size,
            )
            self._keeper.prune()

    def _publish(self, saving: Saving, files: Mapping[str, Written]) -> None:
        """Rank 0, when all files are on disk: the record, and the name by which readers find it."""
        sizes = {name: file.size for name, file in files.items()}
        unseen = list(missing(saving.temporary, sizes))
        if unseen:
            raise HpcdlError(
                f"{self._who.node} doesn't see {unseen[0]}, which another rank has written to"
                f" {saving.temporary.parent}: is the disk shared by all nodes?"
            )
        saving.size = sum(sizes.values())
        record = {
            "totals": saving.totals,
            "first_step": self._first_step,
            "world_size": self._who.world_size,
            "data_digest": self._data_digest,
            "seed": self._spec.seed,
            "global_batch_size": self._spec.trainer.global_batch_size,
            "files": sizes,
            "crc32": {name: f"{file.crc32:08x}" for name, file in files.items()},
        }
        self._keeper.publish(saving.temporary, record)

    def _ended(self, saving: Saving, write: Callable[[], None]) -> None:
        """Runs what writes, or waits for it; where the disk is at fault, says so.

        Raises:
            UnsavedError: the disk took it not, and it is the last one.
            SupersededError: another try has taken the run over.
            HpcdlError: the disk isn't shared.
            RuntimeError: anything else on any rank, with that rank's traceback.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            write()
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if isinstance(cause, HpcdlError):
                raise cause from error
            where = f"{_unwritten(saving)}, by rank {rank}"
            if not isinstance(cause, OSError):
                raise RuntimeError(f"{where}: {type(cause).__name__}: {cause}") from error
            self._not_saved(saving, f"{where}: {cause}", cause)
        except OSError as error:
            self._not_saved(saving, f"{_unwritten(saving)}: {error}", error)

    def _not_saved(self, saving: Saving, problem: str, cause: OSError) -> None:
        found, _ = newest(self._run.checkpoints)
        have = f"{found.path.name} is kept" if found else "there is no other one yet"
        step = saving.totals["step"]
        if self._who.is_first:
            more = {"step": step, "kept": found.step if found else None}
            self._run.event("checkpoint_failed", **more, last=saving.must, message=f"{problem}; {have}")
            print(f"warning: {problem}; {have}", flush=True)
        if not saving.must:
            return
        begins = f"goes on from step {found.step}" if found else "begins anew"
        raise UnsavedError(
            f"{problem}: what was learned up to step {step} is not saved; {have}; make room: launched again, the"
            f" run {begins}"
        ) from cause

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step lies; of the step that the run began from, in another run."""
        own = self._run.checkpoints / name_of(step)
        elsewhere = self._spec.trainer.resume_from
        return own if elsewhere is None or step > self._first_step else Path(elsewhere)

    def load(self, found: Found) -> None:
        """Sets weights, optimizer and random states to the checkpoint's.

        With another number of ranks than it was saved by, each rank seeds anew from (seed, step, rank).

        Raises:
            HpcdlError: this run would not have the batches that the other one would have had, or has other
                tensors.
        """
        from torch.distributed.checkpoint.state_dict_loader import load

        from hpcdl.worker.reading import saved_tensors
        from hpcdl.worker.staging import PassingLoader
        from hpcdl.worker.unpickle import SafeReader

        self._must_go_on_alike(found)
        state, saved = self._engine.state(), saved_tensors(found.path)
        missing = [key for key in state if key not in saved and not key.startswith(OWN)]
        if missing:
            raise HpcdlError(
                f"{found.path.name} lacks {len(missing)} of {len(state)} tensors, {missing[0]} among them:"
                " it is of another model, fine-tuning method or optimizer"
            )
        fitting = {key: state[key] for key in state if key in saved}
        for key, tensor in fitting.items():
            if tensor.shape != saved[key].size and not key.startswith(OWN):
                raise HpcdlError(
                    f"{key} is {tuple(saved[key].size)} in {found.path.name}, and {tuple(tensor.shape)} here:"
                    " it is of another model"
                )
        load(fitting, storage_reader=SafeReader(found.path), planner=PassingLoader(self._engine.let_go))
        self._engine.restored(found.step, frozenset(saved))
        if found.world_size == self._who.world_size:
            rng.load(found.path / f"rng-{self._who.rank:05d}.pt")
        else:
            rng.seed_all(found.seed, self._who.rank, found.step)

    def _must_go_on_alike(self, found: Found) -> None:
        if found.data_digest != self._data_digest:
            if found.path.parent == self._run.checkpoints:
                raise HpcdlError(
                    f"the data has changed since {found.path.name} was saved (other files, tokenizer or"
                    " Python): put it back as it was, or launch a new run with force=true"
                )
            raise HpcdlError(
                f"trainer.resume_from={found.path} was trained on other data (or another seq_len, packing,"
                " tokenizer): a run goes on with the very batches that come next; to train on from its"
                " weights alone, give its result as model.path"
            )
        for key, theirs, ours in found.other_batches(self._spec.seed, self._spec.trainer.global_batch_size):
            raise HpcdlError(
                f"{found.path} was saved with {key}={theirs}, and this run has {ours}:"
                f" it would get other batches; set {key}={theirs}"
            )


def _unwritten(saving: Saving) -> str:
    return f"the checkpoint of step {saving.totals['step']} can't be written to {saving.path.parent}"
