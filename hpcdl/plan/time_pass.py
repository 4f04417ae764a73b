"""Seconds of a share of a micro-batch: what the plan of time adds up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A share of one micro-batch."""

    flops: float = 0.0
    """Seconds of matrix products and attention."""
    moved: float = 0.0
    """Seconds of what moves memory."""
    operations: float = 0.0
    """Started."""

    def __add__(self, other: Pass) -> Pass:
        return Pass(
            flops=self.flops + other.flops,
            moved=self.moved + other.moved,
            operations=self.operations + other.operations,
        )

    def __mul__(self, times: float) -> Pass:
        return Pass(flops=self.flops * times, moved=self.moved * times, operations=self.operations * times)

    @property
    def device_s(self) -> float:
        """Seconds of the device."""
        return self.flops + self.moved
