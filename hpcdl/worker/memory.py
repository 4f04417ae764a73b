"""Where the bytes of this rank go: measured in one step, beside the plan, as memory.json and a table in the log.

The step that is measured runs under hpcdl.worker.storages (some 20 µs an operator); before and after it nothing of
that is there. Its time stands outside the run's, as a profiled step's does.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcdl import compress
from hpcdl.compress import offload
from hpcdl.distributed.engine import Engine, prime, unwatched
from hpcdl.plan import memory as plan
from hpcdl.plan.records import of_rank
from hpcdl.runs import memory as report
from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.worker.metrics import peak_memory_bytes, resident_peak_bytes
from hpcdl.worker.process import Process
from hpcdl.worker.storages import Storage, Tracker, Watching, tensors_of, unique


def step_to_measure(first: int, last: int, taken: Collection[int]) -> int:
    """The first step that is not the first one and that nothing else measures; the first where there is no other."""
    return next((step for step in range(first + 1, last + 1) if step not in taken), first)


class Meter:
    """Measures one step of this rank."""

    def __init__(self, spec: ExperimentSpec, run: RunDir, who: Process, engine: Engine) -> None:
        """Changes nothing yet.

        Args:
            spec: the experiment: what is planned.
            run: where memory.json goes.
            who: this rank.
            engine: what is measured.
        """
        self._spec, self._run, self._who, self._engine = spec, run, who, engine
        self._tracker: Tracker | None = None
        self._watching: Watching | None = None

    def during(self) -> AbstractContextManager[Any]:
        """Put around the step that is measured; compiled blocks are not looked into."""
        if self._spec.trainer.compile:
            return nullcontext()
        engine = self._engine
        if engine.lag == 0 and not offload.streams(self._spec):  # its state is then there, as in later steps
            for optimizer in engine.optimizers():
                prime(optimizer)
        here = unique(chain(tensors_of(engine.stages), engine.copies()))
        known = dict.fromkeys(here, "weights") | dict.fromkeys(unique(_state(engine)), "optimizer")
        self._tracker = Tracker(known)
        self._watching = Watching(self._tracker, engine.stages, engine.trainable.values())
        return self._everywhere(self._watching)

    @contextmanager
    def _everywhere(self, watching: Watching) -> Iterator[None]:
        self._engine.watch(watching.elsewhere)
        try:
            with watching:
                yield
        finally:
            self._engine.watch(unwatched)

    def report(self, step: int) -> dict[str, Any]:
        """Called after the measured step: writes memory.json; the first rank prints the table."""
        if self._watching is not None and self._watching.fault:
            self._tracker = None  # half a step says nothing
            self._run.event(
                "warning",
                message=f"rank {self._who.rank}: a step's memory is unknown: {self._watching.fault}",
            )
        record = self.record(step)
        try:
            write_json(report.file_of(self._run.path, self._who.rank), record)
        except OSError as error:  # not worth the training's end
            print(f"memory: {error}", flush=True)
        if self._who.is_first:
            print(report.as_text(record), flush=True)
        return record

    def record(self, step: int) -> dict[str, Any]:
        """What memory.json holds."""
        engine, tracker = self._engine, self._tracker
        device = engine.device.type
        trained = unique(parameter.detach() for parameter in engine.trainable.values())
        weights = unique(chain(tensors_of(engine.stages), engine.copies()))
        adapters: dict[int, Storage] = {}
        if compress.freezes_base(self._spec):
            adapters = trained
            weights = {at: storage for at, storage in weights.items() if at not in trained}
        optimizer = unique(_state(engine))
        measured = {
            "weights": _bytes(weights.values()),
            "adapters": _bytes(adapters.values()),
            "optimizer": _bytes(optimizer.values()),
        }
        always = sum(measured.values())
        if tracker is not None:
            measured |= tracker.highest
            measured["tensors"] = always + tracker.peak
        mapped = mapped_files(weights)
        now = resident()
        let_go = give_back()
        found: dict[str, Any] = {
            "step": step,
            "rank": self._who.rank,
            "world_size": self._who.world_size,
            "device": device,
            "planned": planned(self._spec, self._who, device),
            "mapped_bytes": sum(weights[at].nbytes() for at in mapped),
            "mapped_resident_bytes": sum(mapped.values()),
            "resident": now,
        }
        on_host = always - found["mapped_bytes"] + found["mapped_resident_bytes"] if device == "cpu" else 0
        if device == "cuda":
            measured["peak"] = torch.cuda.max_memory_allocated(engine.device)
            measured["reserved"] = torch.cuda.max_memory_reserved(engine.device)
        else:
            measured["kept"] = let_go
            measured["runtime"] = max(0, now["now"] - let_go - on_host)
            measured["peak"] = now["peak"]
        return {**found, "measured": measured, "at_peak": tracker.at_peak if tracker else {}}


def planned(spec: ExperimentSpec, who: Process, device: str) -> dict[str, Any] | None:
    """What was planned for this rank: categories, each at its own highest, and what they come to; None: unknown."""
    stages = plan.ranks(spec, device, who.world_size)
    if stages is None:
        return None
    mine = of_rank(stages, who.rank)
    return {
        **mine.bytes,
        "tensors": mine.tensors,
        "allocator": mine.allocator,
        "runtime": mine.runtime,
        "peak": mine.peak,
        "moment": mine.moment,
        "at_peak": mine.at_peak,
    }


def note_end(run: RunDir, who: Process, device: torch.device) -> None:
    """Adds to memory.json what this process had at most, checkpoints and result included: the last thing of a run."""
    file = report.file_of(run.path, who.rank)
    record = report.read(file)
    if record is None:  # nobody wanted to know, or the disk was full
        return
    record["ended"] = {"peak": peak_memory_bytes(device), **_of_gpu(device)}
    try:
        write_json(file, record)
    except OSError as error:
        print(f"memory: {error}", flush=True)


def _of_gpu(device: torch.device) -> dict[str, int]:
    """What the allocator has reserved at most, and what the device holds beside it: contexts, NCCL, others' too."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    return {"reserved": torch.cuda.max_memory_reserved(device), "beside": max(0, beside)}


def give_back() -> int:
    """Has the allocator give freed memory back to the kernel; bytes that this was (0 where it can't be told)."""
    before = resident()["now"]
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return max(0, before - resident()["now"])


def _state(engine: Engine) -> Iterable[Tensor]:
    """The optimizer's tensors."""
    for optimizer in engine.optimizers():
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    yield value


def _bytes(storages: Iterable[Storage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def resident() -> dict[str, int]:
    """This process's memory as the kernel has it (proc(5), status), in bytes."""
    found = {"now": 0, "anonymous": 0, "file": 0, "peak": resident_peak_bytes()}
    names = {"VmRSS": "now", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "file"}
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return found
    for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE):
        if name in names:
            found[names[name]] += int(size) * 1024
    return found


def mapped_files(storages: dict[int, Storage]) -> dict[int, int]:
    """Those of the storages that lie in a file mapped into memory, and how much of each is resident.

    A mapping's resident pages are shared out among its storages by their size.
    """
    if not any(storage.device.type == "cpu" for storage in storages.values()):
        return {}
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return {}
    head = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+\s+(/\S.*)?$")
    found: dict[int, int] = {}
    left = sorted(at for at, storage in storages.items() if storage.device.type == "cpu")
    begin = end = 0
    for line in text.splitlines():
        match = head.match(line)
        if match:
            begin, end = int(match[1], 16), int(match[2], 16)
            if not match[3]:
                end = begin
        elif line.startswith("Rss:") and end > begin:
            inside = [at for at in left if begin <= at < end]
            share = int(line.split()[1]) * 1024 / (end - begin)
            found |= {at: min(storages[at].nbytes(), round(storages[at].nbytes() * share)) for at in inside}
    return found
