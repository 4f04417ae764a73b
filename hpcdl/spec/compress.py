"""Bases of what makes a model smaller or its training cheaper; each method's own file has its keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftSpec:
    """Base of the fine-tuning methods; `hpcdl.compress.<name>.Config` is what a config becomes."""

    name: str
    """The method: `none`, or the name of a file in hpcdl/compress/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How frozen weights are held; `hpcdl.compress.quant.<scheme>.Config` is what a config becomes."""

    scheme: str
    """`none`: weights stay in the training precision; else the name of a file in hpcdl/compress/quant/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSpec:
    """Which weights are zero; `hpcdl.compress.prune.<name>.Config` is what a config becomes."""

    name: str
    """`none`: no weight is taken out; else the name of a file in hpcdl/compress/prune/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadSpec:
    """Where weights lie between their turns; `hpcdl.compress.offload.<name>.Config` is what a config becomes."""

    name: str
    """`none`: where the strategy puts them; else the name of a file in hpcdl/compress/offload/."""
