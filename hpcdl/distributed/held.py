"""Frozen matrices that are held in fewer bits than they compute in, and the layers that use them.

A `Matrix` knows how to make some of its rows whole; a layer around one makes what it needs, uses it and lets
it go. Nothing 16-bit is kept: the backward pass makes the rows again, and gives a gradient to the input only.
What a scheme of hpcdl.compress.quant adds is a subclass of `Matrix`.
"""

from __future__ import annotations

import ctypes
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hpcdl.errors import HpcdlError

WHOLE = 2**26
"""Weights that a layer makes whole at a time: 128 MiB in bf16. An 8B's largest matrix but the head has 2^25.8."""

MADV_DONTNEED = 4
"""madvise(2): the pages leave this process's memory; those of a file come again from it when they are used."""

_MAPPED: dict[int, Tensor] = {}
"""Tensors whose memory is a file's, by their address: kept, so that nothing else can ever lie there."""


class Matrix(nn.Module, ABC):
    """A frozen `(rows, columns)` matrix in a few tensors of its own; `weight` has its digits.

    Tensors are moved between devices with the module; those of a floating dtype must not be cast.
    """

    kind = ""
    """What it is called in files and messages."""
    step = 1
    """`rows` is given multiples of this, but for the end."""
    packed: tuple[str, ...] = ("weight",)
    """Names of its tensors."""
    weight: nn.Parameter

    def __init__(self, rows: int, columns: int, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors as they are, mmapped ones too.

        Args:
            rows: of the matrix that they stand for.
            columns: of it.
            tensors: as `packed` names them.
        """
        super().__init__()
        self.out_features = rows
        self.in_features = columns
        for name in self.packed:
            self.register_parameter(name, nn.Parameter(tensors[name], requires_grad=False))

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.weight.device

    @abstractmethod
    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows `first … last - 1` in `dtype`, `(last - first, columns)`."""

    @abstractmethod
    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `ids`, any shape, in `dtype`: `(*ids.shape, columns)`."""

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All of it in `dtype`."""
        return self.rows(0, self.out_features, dtype)

    def slices(self, weights: int = WHOLE) -> Iterator[tuple[int, int]]:
        """First and last row, excluded, of consecutive parts of about so many weights each."""
        rows = max(1, weights // self.in_features // self.step) * self.step
        for first in range(0, self.out_features, rows):
            yield first, min(first + rows, self.out_features)

    def give_back_after_use(self) -> None:
        """Has layers give the pages back once a product is done. Only where the tensors are mapped from a file.

        Other memory would be lost, so this holds for the very tensors that are here now: not for copies of them.
        """
        for tensor in self.parameters():
            _MAPPED[tensor.data_ptr()] = tensor.detach()

    def used(self) -> None:
        """A layer is done with it for now."""
        for tensor in self.parameters():
            at = tensor.data_ptr()
            if at in _MAPPED and tensor.device.type == "cpu":
                first = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE
                size = (at + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
                if size > 0:
                    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_DONTNEED)

    def bytes(self) -> int:
        """What it takes."""
        return sum(tensor.nbytes for tensor in self.parameters())

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.out_features}, {self.in_features}, {self.kind}"


class Product(torch.autograd.Function):
    """`x @ matrix.T`, the matrix made whole in parts, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        """`(…, columns)` → `(…, rows)`; keeps nothing but the matrix itself."""
        ctx.matrix, ctx.dtype = matrix, x.dtype
        parts = list(matrix.slices())
        if len(parts) == 1:
            out = x @ matrix.whole(x.dtype).T
        else:
            out = x.new_empty(*x.shape[:-1], matrix.out_features)
            for first, last in parts:
                out[..., first:last] = x @ matrix.rows(first, last, x.dtype).T
        matrix.used()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The input's gradient; summed in fp32 over the parts where there are several."""
        matrix, parts = ctx.matrix, list(ctx.matrix.slices())
        if len(parts) == 1:
            total = grad @ matrix.whole(grad.dtype)
        else:
            total = grad.new_zeros(*grad.shape[:-1], matrix.in_features, dtype=torch.float32)
            for first, last in parts:
                total += grad[..., first:last] @ matrix.rows(first, last, grad.dtype)
        matrix.used()
        return total.to(ctx.dtype), None


class HeldLinear(nn.Linear):
    """A frozen linear layer over a `Matrix`; peft's LoRA wraps it as it wraps any linear layer.

    `weight` is the matrix's digits: code that takes it for the matrix fails on its dtype.
    """

    def __init__(self, matrix: Matrix, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a matrix
        self.in_features = matrix.in_features
        self.out_features = matrix.out_features
        self.matrix = matrix
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        )

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The matrix's digits."""
        return self.matrix.weight

    def forward(self, input: Tensor) -> Tensor:
        """In autocast's dtype, or the input's."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        out: Tensor = Product.apply(input, self.matrix)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class HeldEmbedding(nn.Embedding):
    """A frozen embedding over a `Matrix`, which may be the head's too: only the rows asked for are made whole."""

    def __init__(self, matrix: Matrix, padding_idx: int | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would make a matrix
        self.num_embeddings = matrix.out_features
        self.embedding_dim = matrix.in_features
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.matrix = matrix
        self.dtype = dtype
        """Of the rows that come out."""

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The matrix's digits."""
        return self.matrix.weight

    def forward(self, input: Tensor) -> Tensor:
        """Token ids of any shape → `(*shape, columns)`."""
        return self.matrix.pick(input, self.dtype)


def refuse_merging(model: nn.Module) -> None:
    """Has peft's layers refuse to be merged into a held matrix: what came out would be rounded, or lost."""
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        tensor_of_tensors = hasattr(getattr(base, "weight", None), "__tensor_flatten__")
        if hasattr(module, "merge") and (isinstance(base, HeldLinear) or tensor_of_tensors):
            setattr(module, "merge", partial(_refuse, name))  # noqa: B010


def _refuse(name: str, *args: Any, **more: Any) -> None:
    raise HpcdlError(
        f"{name} is held in fewer bits, and an adapter can't be merged into that:"
        " load the base in 16 bits and merge there"
    )


def parameter_count(model: nn.Module) -> int:
    """Parameters as they are counted in a paper: a matrix's rows times columns however it is held, tied ones once."""
    held = {id(m): m for m in model.modules() if isinstance(m, Matrix)}
    inside = {id(p) for m in held.values() for p in m.parameters()}
    count = sum(m.out_features * m.in_features for m in held.values())
    return count + sum(p.numel() for p in model.parameters() if id(p) not in inside)
