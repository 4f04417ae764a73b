"""A matrix and the way beside it, told to a Tape: LoRA's and DoRA's layers (peft 0.21, tuners/lora)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcdl.plan.tape import BUFFERS, Var, Weight

if TYPE_CHECKING:
    from hpcdl.plan.block import Linear, Passing

ROWS = ("o_proj", "down_proj")
"""Matrices whose inputs tensor parallel splits; of the others it splits the outputs (hpcdl.distributed.tensor)."""


def linear(passing: Passing, name: str, x: Var, tokens: float) -> Var:
    """A matrix and its adapter; `x` stays the caller's."""
    linear, tape, block = passing.matrices[name], passing.tape, passing.block
    result = passing.base(name, x, tokens)
    summand = block.tp > 1 and name in ROWS
    arrived = block.tokens if summand else tokens
    if summand:
        result = passing.leave(result, linear.rows)
    if not linear.rank:
        return result
    e, rank = block.compute, linear.rank
    wide = passing.cast(x, block.adapters * tokens * linear.columns)
    before = wide
    if linear.dropout:
        # on a CPU a tensor of zeros and 1/(1-p), on a GPU booleans (native_dropout)
        mask = tape.new(tokens * linear.columns if block.gpu else wide.bytes)
        before = tape.op(wide.bytes, to=[(wide, wide.bytes)], saves=[mask])
        tape.drop(mask)
        tape.done(wide)
    a = passing.weight(name, "A", block.adapters * rank * linear.columns)
    b = passing.weight(name, "B", block.adapters * rank * linear.rows)
    if linear.lengths:
        _lengths(passing, linear, a, b)
    down = passing.product(before, a, rank, linear.columns, tokens, block.adapters)
    if summand:
        down = passing.leave(down, rank)
    up = passing.product(down, b, linear.rows, rank, arrived, block.adapters)
    tape.done(down)
    size = e * arrived * linear.rows
    if linear.lengths:
        beside = _with_lengths(passing, linear, name, result, up, before, tokens)
    else:
        beside = tape.op(size, to=[(up, size)])
    tape.done(up)
    out = tape.op(size, to=[(result, -1), (beside, -1)])
    tape.done(result, beside, before)
    return out


def _lengths(passing: Passing, linear: Linear, a: Weight, b: Weight) -> None:
    """DoRA's norm of W + B·A, made anew in each pass (peft.tuners.lora.dora, DoraLinearLayer.forward)."""
    tape, e, c = passing.tape, passing.block.compute, passing.block.adapters
    eye = tape.new(c * linear.columns**2, BUFFERS)
    held = [eye]
    if e != c:
        held.append(tape.new(e * linear.columns**2, BUFFERS))
    held.append(tape.new(e * linear.columns * linear.rank, BUFFERS))
    held.append(tape.new(e * linear.numel, BUFFERS))
    tape.drop(eye)
    held.remove(eye)
    if e != c:
        held.append(tape.new(c * linear.numel, BUFFERS))
        held.append(tape.new(c * linear.numel, BUFFERS))
    scaled, summed = tape.new(c * linear.numel, BUFFERS), tape.new(c * linear.numel, BUFFERS)
    tape.drop_all([scaled, *held])
    tape.take(c * linear.numel)
    tape.drop(summed)


def _with_lengths(
    passing: Passing, linear: Linear, name: str, result: Var, up: Var, before: Var, tokens: float
) -> Var:
    """(m - 1) · base + m · B·A·x · scale, in the wider of both dtypes."""
    tape, block = passing.tape, passing.block
    lengths = passing.weight(name, "m", block.adapters * linear.rows)
    size = max(block.adapters, block.compute) * tokens * linear.rows
    row = tape.op(block.adapters * linear.rows, to=[(lengths, lengths.bytes)])
    first = tape.op(size, to=[(row, size), (result, size)], saves=[result.store, row.store])
    second = tape.op(size, to=[(row, size), (up, size)], saves=[up.store, row.store])
    third = tape.op(size, to=[(second, size)])
    tape.done(second)
    out = tape.op(size, to=[(first, -1), (third, -1)])
    tape.done(first, third, row)
    return out
