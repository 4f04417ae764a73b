"""How frozen weights are held in fewer bits: one file a scheme, found by name.

A scheme's file holds `Config` (a frozen dataclass below `QuantSpec`), `check(config, spec)`,
`memory(config, matrix, plain, compute)` and `apply(config, model)`, which comes before the fine-tuning method;
torch and what quantizes are imported inside functions only.

A scheme that takes one matrix at a time has two functions more, and a model under it is read from disk tensor by
tensor, never whole in 16 bits (hpcdl.worker.streaming): `pack(config, weight)` and `layer(config, linear, packed)`.
`hold_linears` of `_hold.py` is then all that its `apply` needs. A layer is best an HeldLinear over a Matrix of its
own (hpcdl.distributed.held): `_rows8.py` is the shortest example.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, QuantSpec
from hpcdl.spec.layout import Held, Matrix

if TYPE_CHECKING:
    from torch import Tensor, nn

OPTIONAL = ("torchao", "bitsandbytes")
"""Packages that quantize. transformers and peft import them wherever they are installed: seconds a process."""
WRITERS: dict[str, tuple[str, ...]] = {"executorch": ("torchao",)}
"""Formats of hpcdl/export that are written with one of them."""


class Scheme(Protocol):
    """What a scheme's module offers."""

    Config: type[QuantSpec]
    NEEDS: tuple[str, ...]
    """Those of OPTIONAL that it uses."""

    def check(self, config: Any, spec: ExperimentSpec) -> Iterator[Fault]:
        """Faults of this scheme with this experiment."""
        ...

    def memory(self, config: Any, matrix: Matrix, plain: int, compute: int) -> Held:
        """How many bytes one matrix takes.

        Args:
            config: the scheme's.
            matrix: any of the model's weights: a block's, a norm's, the embedding, the head.
            plain: bytes of a number that isn't quantized.
            compute: bytes of a number in a product.
        """
        ...

    def apply(self, config: Any, model: nn.Module) -> nn.Module:
        """The model with its weights held so; layers that are held already stay."""
        ...


class Streaming(Scheme, Protocol):
    """What a scheme's module offers besides where it takes one matrix at a time.

    With `ANY_DTYPE = True` it says that `pack` gives the same for bf16 weights and for those numbers in fp32.
    """

    def pack(self, config: Any, weight: Tensor) -> dict[str, Tensor]:
        """What is kept of a matrix `(rows, columns)` in 16 or 32 bits; new tensors.

        Raises:
            HpcdlError: it can't be held so; says why, not which matrix it is.
        """
        ...

    def layer(self, config: Any, linear: nn.Linear, packed: Mapping[str, Tensor]) -> nn.Linear:
        """The layer that holds what `pack` gave, kept as it is: it may be mmapped.

        Args:
            config: the scheme's.
            linear: the layer whose place it takes; its weight may be on the meta device.
            packed: what `pack` gave, from memory or from a file.
        """
        ...


_folder: Folder[Scheme] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get


def resolved(spec: ExperimentSpec) -> QuantSpec:
    """The experiment's scheme with what it leaves to the strategy filled in (`backend: auto`)."""
    fill = getattr(get(spec.quant.scheme), "fill", None)
    return spec.quant if fill is None else replace(spec.quant, **fill(spec.quant, spec))


def hold(spec: ExperimentSpec, model: Any) -> Any:
    """The model with its weights held as the experiment says."""
    return get(spec.quant.scheme).apply(resolved(spec), model)


def why_whole(spec: ExperimentSpec) -> str | None:
    """Why a model can't be read tensor by tensor under this scheme; None where it can."""
    if spec.prune.name != "none":
        return f"prune={spec.prune.name} looks at the whole model before it is quantized"
    scheme = get(spec.quant.scheme)
    if not hasattr(scheme, "pack") or not hasattr(scheme, "layer"):
        return f"quant={spec.quant.scheme} takes whole models only"
    why = getattr(scheme, "why_whole", None)
    return None if why is None else why(resolved(spec))


def needs(spec: ExperimentSpec, written: str | None = None) -> Iterable[str]:
    """Packages of OPTIONAL that the experiment uses.

    Args:
        spec: the experiment.
        written: the format that a model is exported to; None: what the experiment's task says, if it exports.
    """
    asked = getattr(get(spec.quant.scheme), "needs", None)
    used = get(spec.quant.scheme).NEEDS if asked is None else asked(resolved(spec))
    of_format = WRITERS.get(str(written or getattr(spec.task, "to", "")), ())
    return {*used, *of_format, *(["bitsandbytes"] if spec.optim.name == "adamw8bit" else [])}


def hide_unused(used: Iterable[str]) -> None:
    """Has this process do as if quantizers that aren't among `used` weren't installed (torchao: 2.8 s).

    Those that it needs come without their warnings at import. To be called before transformers is imported;
    what is imported already stays.
    """
    used = set(used)
    for package in OPTIONAL:
        if package in used:
            for logger in (
                package,
                "torch.utils._pytree",
                "bitsandbytes.backends.cpu.ops",
            ):  # tell of other devices' kernels, of names to come
                logging.getLogger(logger).setLevel(logging.ERROR)
        else:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # find_spec() then says: not there
