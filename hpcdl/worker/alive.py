"""What lives in this process's memory now: by line of Python, by kind of tensor, by allocator."""

from __future__ import annotations

import ctypes
import gc
import linecache
import re
import sys
import sysconfig
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NUMBERS = ("resident", "malloc_used", "malloc_free", "cuda_allocated", "cuda_reserved")
"""What `numbers` reads, in bytes; -1: can't be read here."""
_NO_FILE = re.compile(rb"Rss(?:Anon|Shmem):\s+(\d+) kB")
_CALLERS = 3
"""Frames that are told, the line itself included."""
_PACKAGES = ("/site-packages/", "/dist-packages/", "<frozen", f"{sysconfig.get_paths()['stdlib']}/")
_HPCDL = f"{Path(__file__).parents[1]}/"
_OWN = (str(Path(__file__)), str(Path(__file__).with_name("growth.py")), tracemalloc.__file__)


class _Mallinfo2(ctypes.Structure):
    """glibc's struct of that name (mallinfo(3))."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd",
                     "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def _mallinfo() -> Any:
    try:
        function = ctypes.CDLL(None).mallinfo2  # glibc 2.33 and later
    except (AttributeError, OSError):
        return None
    function.restype = _Mallinfo2
    return function


_malloc = _mallinfo()


def numbers() -> tuple[float, ...]:
    """NUMBERS, now. tracemalloc's own memory is taken off malloc's."""
    resident = _anonymous_bytes()
    used = free = -1.0
    if _malloc is not None:
        info = _malloc()
        used, free = float(info.uordblks + info.hblkhd), float(info.fordblks)
        if used + free < 0.05 * resident:  # another allocator is in its place (jemalloc, by LD_PRELOAD)
            used = free = -1.0
    traces = tracemalloc.get_tracemalloc_memory()
    if used >= 0:
        used -= traces
    return (resident - traces, used, free, *_cuda_bytes())


def _anonymous_bytes() -> float:
    """Resident memory less mapped files' pages; memory that is shared with other processes counts."""
    with open("/proc/self/status", "rb") as file:  # noqa: PTH123 a quicker one
        text = file.read()
    return 1024.0 * sum(int(found) for found in _NO_FILE.findall(text))


def _cuda_bytes() -> tuple[float, float]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return -1.0, -1.0
    devices = range(torch.cuda.device_count())
    return (
        float(sum(torch.cuda.memory_allocated(device) for device in devices)),
        float(sum(torch.cuda.memory_reserved(device) for device in devices)),
    )


def chosen(frames: Iterable[tuple[str, int]]) -> str:
    """The lines to blame, `path:line` and its callers behind ` < `: the innermost of the
    user's own code, else of hpcdl's, else of all.

    Args:
        frames: path and line, the innermost first.
    """
    listed = list(frames)
    own = [each for each in listed if not any(part in each[0] for part in _PACKAGES)]
    foreign = [each for each in own if not each[0].startswith(_HPCDL)]
    return " < ".join(f"{path}:{line}" for path, line in (foreign or own or listed[:1])[:_CALLERS])


def shown(where: str) -> str:
    """A place as it is told: inside a package from the package on, below the working directory from there on."""
    first = where.partition(" < ")[0]
    for part in _PACKAGES[:2]:
        if part in first:
            return first.rpartition(part)[2]
    return first.removeprefix(f"{Path.cwd()}/")


def text_of(where: str) -> str:
    """The source line there, and where it was called from; empty where there is no source."""
    texts: list[str] = []
    for place in where.split(" < ") if where else ():
        path, _, line = place.rpartition(":")
        text = linecache.getline(path, int(line)).strip()[:100]
        texts.append(f", from {shown(place)} {text}" if texts else text)
    return "".join(texts)


class Lines:
    """What tracemalloc has seen and still lives, by line."""

    def __init__(self) -> None:
        self.bytes: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.traced = 0
        self.count = 0
        statistics = tracemalloc.take_snapshot().statistics("traceback")
        for each in statistics:
            # The oldest frame is the first one.
            frames = [(frame.filename, frame.lineno) for frame in reversed(each.traceback)]
            if any(path in _OWN for path, _ in frames):
                continue
            where = chosen(frames)
            self.bytes[where] = self.bytes.get(where, 0.0) + each.size
            self.counts[where] = self.counts.get(where, 0.0) + each.count
            self.traced += each.size
            self.count += each.count


class Tensors:
    """The living tensors that the garbage collector knows, by kind and by the line that made them."""

    def __init__(self) -> None:
        self.bytes: dict[str, float] = {}
        """By key."""
        self.counts: dict[str, float] = {}
        self.graphs: dict[str, float] = {}
        """How many of a key hold an autograd graph."""
        self.line: dict[str, str] = {}
        """Of a key, as far as tracemalloc has seen them made; else empty. Python 3.11 looks in the wrong place for an
        object with a dict of its own, and finds none."""
        self._shapes: dict[str, Counter[tuple[int, ...]]] = {}
        tensor = getattr(sys.modules.get("torch"), "Tensor", None)
        if tensor is None:
            return
        seen: set[int] = set()
        known: dict[type, bool] = {}
        for each in gc.get_objects():
            kind = type(each)  # not isinstance(): a proxy's __class__ may do anything
            is_tensor = known.get(kind)
            if is_tensor is None:
                is_tensor = known[kind] = issubclass(kind, tensor)
            if is_tensor:
                self._take(each, seen)

    def kind(self, key: str) -> str:
        """`Tensor float32 on cpu, mostly (8, 512)`."""
        shape = self._shapes[key].most_common(1)[0][0]
        return f"{key.partition('|')[0]}, mostly {shape}"

    def _take(self, tensor: Any, seen: set[int]) -> None:
        try:
            shape, place = tuple(tensor.shape), tensor.untyped_storage().data_ptr()
            size = tensor.numel() * tensor.element_size()
            graph = tensor.grad_fn is not None
        except Exception:  # a kind without a storage, or with one of its own
            return
        trace = tracemalloc.get_object_traceback(tensor)
        line = chosen((frame.filename, frame.lineno) for frame in reversed(trace)) if trace else ""
        kind = f"{type(tensor).__name__} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        key = f"{kind}{' with an autograd graph' if graph else ''}|{line}"
        if place and place in seen:
            size = 0  # a view of what was counted
        seen.add(place)
        self.line[key] = line
        self.bytes[key] = self.bytes.get(key, 0.0) + size
        self.counts[key] = self.counts.get(key, 0.0) + 1
        self.graphs[key] = self.graphs.get(key, 0.0) + graph
        self._shapes.setdefault(key, Counter())[shape] += 1


class Cuda:
    """torch's record of what lives on GPUs, with stacks; from its making to `close`."""

    def __init__(self) -> None:
        torch = sys.modules.get("torch")
        self._memory: Any = None
        if torch is not None and torch.cuda.is_initialized():
            self._memory = torch.cuda.memory
            self._memory._record_memory_history(enabled="state", context="state", stacks="python")

    def by_line(self) -> dict[str, float]:
        """Bytes in use that were asked for since, by line."""
        found: dict[str, float] = {}
        for segment in self._memory._snapshot()["segments"] if self._memory else ():
            for block in segment["blocks"]:
                frames = block.get("frames") or ()
                if block["state"] == "active_allocated" and frames:
                    where = chosen((frame["filename"], frame["line"]) for frame in frames)
                    found[where] = found.get(where, 0.0) + block.get("requested_size", block["size"])
        return found

    def close(self) -> None:
        """Ends the record."""
        if self._memory is not None:
            self._memory._record_memory_history(enabled=None)
            self._memory = None
