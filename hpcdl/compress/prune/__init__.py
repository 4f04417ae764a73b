"""Which weights of a model are taken out: one file a method, found by name.

A method's file holds `Config` (a frozen dataclass below `PruneSpec`), `check(config, spec)`,
`memory(config, spec)` and `apply(config, model, text)`, which comes before quantization and the fine-tuning
method; torch is imported inside `apply` only. A weight that is taken out is zero from then on: the zeros of
the weights are the mask (hpcdl.compress.prune._zeros).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hpcdl.byname import Folder
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, PruneSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


class Pruner(Protocol):
    """What a method's module offers."""

    Config: type[PruneSpec]
    CALIBRATED: bool
    """Whether it runs text through the model: then `Config.calibration_samples` says how much."""
    REWEIGHTS: bool
    """Whether it changes the weights that it keeps."""

    def check(self, config: Any, spec: ExperimentSpec) -> Iterator[Fault]:
        """Faults of this method with this experiment."""
        ...

    def memory(self, config: Any, spec: ExperimentSpec) -> dict[str, int]:
        """Bytes that pruning takes beside the model, by what they hold; empty where the shape isn't known."""
        ...

    def apply(self, config: Any, model: nn.Module, text: Sequence[Mapping[str, Tensor]]) -> nn.Module:
        """The model with zeros in it.

        Args:
            config: the method's.
            model: transformers' causal language model, whole, on its device; changed in place.
            text: calibration batches for methods that are CALIBRATED: `input_ids`, `position_ids`, `labels`
                as in hpcdl.worker.data.batches and `real`, where they are no padding, each `(rows, seq_len)`.
        """
        ...


_folder: Folder[Pruner] = Folder(__name__, __path__)
names, get = _folder.names, _folder.get
