"""What one training step holds in tensors: every storage that it makes, from its birth to its end, by what it is for.

A TorchDispatchMode sees each operator's result, on the CPU and on a GPU, in the forward and the backward pass; a
weak reference tells when a storage is gone. It sees no memory that an operator takes for itself and gives back
(workspaces of matrix products and attention): the process's memory has that, and it's told beside.

What a storage is for:

activations  autograd keeps it for the backward pass
recomputed   the same, in a block that is computed again in the backward pass (activation checkpointing)
logits       made in the loss
buffers      made of weights alone: 4-bit matrices made whole, fp32 ones cast to bf16, sharded ones gathered
gradients    a parameter's
temporary    all else

What is there before the step (weights, adapters, optimizer state) is counted by `held`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from hpcdl.distributed.decoder import Stage

KINDS = ("activations", "recomputed", "logits", "buffers", "gradients", "temporary")
"""What a step makes."""

Storage = torch.UntypedStorage


def storages(tensor: Tensor) -> Iterator[Storage]:
    """The storages of a tensor; of a tensor made of tensors (DTensor, quantized) those of its parts."""
    parts: Any = tensor
    if is_traceable_wrapper_subclass(parts):
        names, _ = parts.__tensor_flatten__()
        for part in (getattr(parts, name) for name in names):
            if isinstance(part, Tensor):  # beside them a DTensor has its mesh
                yield from storages(part)
    elif tensor.layout == torch.strided and not tensor.is_meta:
        yield tensor.untyped_storage()
    # what bitsandbytes hangs on a parameter: its scales, and the scales' own
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        for value in vars(state).values():
            if isinstance(value, Tensor):
                yield from storages(value)
        state = getattr(state, "state2", None)


def unique(tensors: Iterable[Tensor]) -> dict[int, Storage]:
    """Their storages by address, each once; those without memory left out."""
    found = {}
    for tensor in tensors:
        for storage in storages(tensor):
            if storage.nbytes():
                found[storage.data_ptr()] = storage
    return found


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and tensors that modules keep beside them (a quantizer's tables and scales)."""
    for part in module.modules():
        for own in (part._parameters, part._buffers, vars(part)):
            for value in own.values():
                if isinstance(value, Tensor):
                    yield value


@dataclass(slots=True)
class Tracker:
    """Live bytes of what a step makes, by kind; their highest, each by itself and all together."""

    known: dict[int, str]
    """Addresses of what was there before: weights and what belongs to them."""
    live: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    highest: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """Of each kind by itself."""
    total: int = 0
    peak: int = 0
    """Of all together."""
    at_peak: dict[str, int] = field(default_factory=dict)
    """By kind when all together were highest."""
    _seen: dict[int, tuple[str, int, Any]] = field(default_factory=dict)
    """By the storage's own address in C++: its kind, its bytes, the weak reference."""
    _lock: Any = field(default_factory=threading.RLock)
    """Other threads make tensors too (a parameter server's); a thread that holds it may see storages go."""

    def add(self, storage: Storage, kind: str) -> None:
        """A storage that an operator gave; known ones stay what they are."""
        with self._lock:
            self._add(storage, kind)

    def _add(self, storage: Storage, kind: str) -> None:
        size, key = storage.nbytes(), storage._cdata
        if key in self._seen:
            known_kind, known_size, reference = self._seen[key]
            if size != known_size:
                self._seen[key] = known_kind, size, reference
                self._change(known_kind, size - known_size)
            return
        if not size or storage.data_ptr() in self.known:
            return
        self._seen[key] = kind, size, weakref.ref(storage, lambda _: self._gone(key))
        self._change(kind, size)

    def kind(self, storage: Storage) -> str | None:
        """What a storage is for; None where nothing is known of it."""
        seen = self._seen.get(storage._cdata)
        return seen[0] if seen else self.known.get(storage.data_ptr())

    def turn(self, storage: Storage, kind: str, *, of: tuple[str, ...] = ("temporary",)) -> None:
        """It has become something else."""
        with self._lock:
            seen = self._seen.get(storage._cdata)
            if seen is None or seen[0] not in of:
                return
            was, size, reference = seen
            self._seen[storage._cdata] = kind, size, reference
            self.live[was] -= size
            self.live[kind] += size
            self.highest[kind] = max(self.highest[kind], self.live[kind])
            if self.total == self.peak:
                self.at_peak = dict(self.live)

    def _gone(self, key: int) -> None:
        with self._lock:
            kind, size, _ = self._seen.pop(key)
            self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        self.live[kind] += size
        self.total += size
        if size > 0:
            self.highest[kind] = max(self.highest[kind], self.live[kind])
            if self.total > self.peak:
                self.peak, self.at_peak = self.total, dict(self.live)


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills a Tracker while it is on; for one step."""

    def __init__(self, tracker: Tracker, stages: nn.ModuleList, trainable: Iterable[nn.Parameter]) -> None:
        """Changes nothing yet.

        Args:
            tracker: is filled.
            stages: whose losses are told from the rest.
            trainable: parameters whose gradients are.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker = tracker
        self._stages = [module for module in stages.modules() if isinstance(module, Stage)]
        self._trainable = list(trainable)
        self._in_loss = False
        self.fault = ""
        """Why it stopped looking: a tensor that it can't look into."""
        self._undo = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.look(func, types, args, kwargs)

    def look(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Runs the operator and looks at what it gave."""
        if any(issubclass(kind, Tensor) and hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # its parts will come by themselves
        result = func(*args, **(kwargs or {}))
        if not self.fault:
            try:
                self._look(func, args, kwargs, result)
            except Exception as error:  # tensors that nobody has thought of must not end a training
                self.fault = f"{func}: {type(error).__name__}: {error}"
        return result

    def elsewhere(self, tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
        """Looks at another thread's operators; modes are a thread's own.

        Args:
            tensors: that no operator made: they came over the network.
        """
        for tensor in tensors:
            for storage in storages(tensor):
                self.tracker.add(storage, "temporary")
        return _Elsewhere(self)

    def _look(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        kind = self._kind(func, args, kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                # a collective's result is a tensor around another one, under tensor parallel
                for storage in storages(tensor):
                    self.tracker.add(storage, kind)

    def _kind(self, func: Any, args: Any, kwargs: Any) -> str:
        backward = torch._C._current_graph_task_id() != -1
        if backward and func is torch.ops.aten.detach.default and self._recomputing():
            # so does torch.utils.checkpoint keep what it has computed again
            for storage in storages(args[0]):
                self.tracker.turn(storage, "recomputed")
        if self._in_loss and not backward:
            return "logits"
        given = [
            self.tracker.kind(storage) or ("weights" if tensor.is_floating_point() else "")
            for tensor in tree_iter((args, kwargs))
            if isinstance(tensor, Tensor)
            for storage in storages(tensor)
        ]  # numbers that were there before and that nobody knows of: a quantizer's tables
        return "buffers" if given and all(kind in ("weights", "buffers") for kind in given) else "temporary"

    def _recomputing(self) -> bool:
        """Whether saved tensors go to somebody else's hook at present: torch.utils.checkpoint's."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return hooks is not None and hooks[0] != self._keep

    def _keep(self, tensor: Tensor) -> Tensor:
        for storage in storages(tensor):
            self.tracker.turn(storage, "activations")
        # An operation that saves its own result would hold itself: where the graph is kept (a pipeline that splits its
        # backward pass), it would never be let go.
        return tensor if tensor.grad_fn is None else tensor.detach()

    def __enter__(self) -> Watching:
        undo = self._undo
        for stage in self._stages:
            undo.callback(setattr, stage, "loss", stage.loss)
            stage.loss = self._told(stage.loss)
        for parameter in self._trainable:
            if parameter.requires_grad:
                hooked: Any = parameter
                handle = hooked.register_post_accumulate_grad_hook(self._gradient)
                undo.callback(handle.remove)
        undo.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
        undo.enter_context(_Resizing(self.tracker))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._undo.close()

    def _told(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def told(*args: Any, **kwargs: Any) -> Tensor:
            self._in_loss = True
            try:
                return loss(*args, **kwargs)
            finally:
                self._in_loss = False

        return told

    def _gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            for storage in storages(parameter.grad):
                self.tracker.turn(storage, "gradients", of=tuple(KINDS))


class _Elsewhere(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What another thread makes in the same step."""

    def __init__(self, watching: Watching) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watching = watching

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._watching.look(func, types, args, kwargs)


class _Resizing:
    """FSDP lets gathered parameters go by resizing their storage to nothing."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> None:
        self._plain = plain = torch.UntypedStorage.resize_

        def resize(storage: Storage, size: int) -> Any:
            result = plain(storage, size)
            self._tracker.add(storage, "buffers")
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        torch.UntypedStorage.resize_ = self._plain  # type: ignore[method-assign]
