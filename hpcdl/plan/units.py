"""Bytes and seconds as people read them."""

from __future__ import annotations

GIB = 2**30


def gib(count: float) -> str:
    """Bytes in GiB, or MiB where that is little."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / 2**20:.0f} MiB"


def seconds(value: float) -> str:
    """Of a step."""
    if value >= 1:
        return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"
    return f"{value * 1000:.3g} ms"
