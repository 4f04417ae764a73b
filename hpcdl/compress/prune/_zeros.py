"""A pruned base under LoRA: the update gets the base's zeros. How trained weights keep theirs: distributed.zeros.

B·A is made whole and masked: W + mask ⊙ (s·B·A) is what is trained, and what is merged. The mask is the zeros of
the frozen base, or where that is held in fewer bits, a bit a weight beside it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcdl.errors import HpcdlError

BITS = "kept_bits"
"""Buffer of a LoRA layer: which weights of its base are kept, 8 to a byte."""


class _MaskedUpdate:
    """Before one of peft's LoRA layers: the update gets the zeros of the base."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output and each active adapter's, masked."""
        layer = cast(Any, self)
        if layer.disable_adapters or layer.merged:
            whole: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return whole
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        for name in layer.active_adapters:
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                autocast = torch.is_autocast_enabled(x.device.type)
                dropped = layer.lora_dropout[name](x if autocast else x.to(a.dtype))
                # the whole update is as large as the base: it is made again in the backward pass
                more = checkpoint(_update, dropped, a, b, layer.scaling[name], layer, use_reentrant=False)
                result = result + cast(Tensor, more).to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base, `(rows, columns)`."""
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        return delta * kept(self)


def _update(x: Tensor, a: Tensor, b: Tensor, scaling: float, layer: Any) -> Tensor:
    return nn.functional.linear(x, (b @ a) * (kept(layer) * scaling))


def kept(layer: Any) -> Tensor:
    """Which weights of a LoRA layer's base stay, bool `(rows, columns)`."""
    bits = getattr(layer, BITS, None)
    if bits is None:
        weight: Tensor = layer.base_layer.weight
        return weight != 0
    return unpack(bits, layer.out_features * layer.in_features).view(layer.out_features, layer.in_features)


def mask_update(layer: Any, bits: Tensor | None) -> None:
    """Gives one of peft's LoRA layers the mask of its base, in place.

    Args:
        layer: the LoRA layer.
        bits: the mask (`pack`) where the base's own zeros don't say it: it is held in fewer bits.

    Raises:
        HpcdlError: the update isn't plain LoRA's.
    """
    if getattr(layer, "lora_variant", None):
        raise HpcdlError(
            "a pruned base takes plain LoRA only: DoRA's norms and other variants would be of unmasked weights;"
            " prune=none, or plain LoRA"
        )
    if bits is not None:
        layer.register_buffer(BITS, bits, persistent=False)
    cls = type(layer)
    layer.__class__ = type(f"Masked{cls.__name__}", (_MaskedUpdate, cls), {})


def pack(mask: Tensor) -> Tensor:
    """Bits, 8 to a byte, the first highest: uint8 `(⌈elements / 8⌉,)`."""
    flat = mask.flatten()
    rest = -len(flat) % 8
    if rest:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    return (flat.view(-1, 8).to(torch.uint8) << _shifts(flat.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, elements: int) -> Tensor:
    """The mask that `pack` was given, bool `(elements,)`."""
    return ((bits[:, None] >> _shifts(bits.device)) & 1).flatten()[:elements].bool()


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
