"""How frozen weights are held in fewer bits: one file a scheme, found by name.

A scheme's file holds `Config` (a frozen dataclass below `QuantSpec`), `check(config, spec)`,
`memory(config, matrix, plain, compute)` and `apply(config, model)`, which comes before the fine-tuning method;
torch and what quantizes are imported inside `apply` only.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, QuantSpec
from hpcdl.spec.layout import Held, Matrix

if TYPE_CHECKING:
    from torch import nn

OPTIONAL = ("torchao",)
"""Packages that quantize. transformers and peft import them wherever they are installed: seconds a process."""


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
        """The model with its weights held so."""
        ...


_folder: Folder[Scheme] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get


def hide_unused(name: str) -> None:
    """Has this process do as if quantizers that `name` doesn't need weren't installed (torchao: 2.8 s).

    Those that it needs come without their warnings at import. To be called before transformers is imported;
    what is imported already stays.
    """
    for package in OPTIONAL:
        if package in get(name).NEEDS:
            for logger in (
                package,
                "torch.utils._pytree",
            ):  # tell of other devices' kernels, of names to come
                logging.getLogger(logger).setLevel(logging.ERROR)
        else:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # find_spec() then says: not there
