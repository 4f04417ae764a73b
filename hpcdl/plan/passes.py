"""A block's and the loss's passes as a few sums, from which a stage of any depth is put together.

A block is played on a Tape once (hpcdl.plan.block); blocks of one model are alike, so what the others hold is that
times their number. Results are kept: a search asks for the same block again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hpcdl.plan.block import Block, Passing
from hpcdl.plan.loss import Head, loss
from hpcdl.plan.tape import ACTIVATIONS, GRADIENTS, RECOMPUTED, TEMPORARY, Bytes, Tape

NOTHING: Bytes = (0.0,) * 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The highest moment of a pass, relative to what lay there before."""

    bytes: Bytes
    """By kind."""
    with_inside: float
    """All together, with what operators take for themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """What a block, or the end of a model, holds at its moments."""

    kept: Bytes
    """From its forward pass to its backward pass, its input too where it needs that."""
    cached: Bytes
    """autocast's copies that nothing but the forward pass needs."""
    forward: Peak
    """With its input and its result."""
    backward: Peak
    """With what it kept, and the gradient that comes."""
    gradients: float
    """Of its weights, once it is through."""
    highest: Bytes
    """Of each kind by itself, in either pass."""


def _peak(tape: Tape) -> Peak:
    return Peak(bytes=tape.at_peak, with_inside=max(tape.with_inside, tape.peak))


def _again(tape: Tape) -> None:
    """Measures anew from here."""
    tape.peak, tape.with_inside, tape.at_peak = tape.total, tape.total, tuple(tape.live)


@lru_cache(maxsize=4096)
def block_passes(
    block: Block, *, wants: bool, recompute: bool, gradients_there: bool, bucketed: bool, parked: bool = False
) -> Passes:
    """A block's.

    Args:
        block: the sizes.
        wants: whether a gradient goes back through its input.
        recompute: whether it is computed again on the way back.
        gradients_there: whether an earlier micro-batch has left gradients.
        bucketed: whether DDP takes gradients as they come.
        parked: its input waits somewhere else (trainer.activation_offload).
    """
    size = block.residual * block.tokens * block.width
    tape = Tape(saving=None if recompute else ACTIVATIONS)
    passing = Passing(block, tape, bucketed=bucketed, gradients_there=gradients_there)
    x = tape.var(size, wants=wants)
    out = passing.forward(x)
    forward = _peak(tape)
    if recompute and not parked:
        tape.turn(x.store, ACTIVATIONS)
    else:
        tape.done(x)
    before = tuple(tape.live)
    tape.done(*passing.casts.values())
    cached = tuple(a - b for a, b in zip(before, tape.live, strict=True))
    tape.done(out)
    kept = tuple(tape.live)
    highest = tuple(tape.highest)
    if recompute:
        tape = Tape(saving=RECOMPUTED)
        passing = Passing(block, tape, bucketed=bucketed, gradients_there=gradients_there, stop=True)
        x = tape.var(size, wants=wants, kind=TEMPORARY if parked else ACTIVATIONS)
        given = tape.new(size)
        out = passing.forward(x)
        tape.done(*passing.casts.values())
        out.grad = given
    else:
        _again(tape)
        out.grad = tape.new(size)
    tape.back()
    gradients = sum(w.bytes for w in passing.known.values()) if not bucketed else 0.0
    return Passes(
        kept=kept,
        cached=cached,
        forward=forward,
        backward=_peak(tape),
        gradients=0.0 if gradients_there else gradients,
        highest=tuple(map(max, highest, tape.highest)),
    )


@lru_cache(maxsize=4096)
def end_passes(
    block: Block, head: Head, *, wants: bool, gradients_there: bool, bucketed: bool, tied: bool
) -> Passes:
    """The last norm's and the loss's.

    Args:
        block: whose stream comes in.
        head: the sizes.
        wants: whether a gradient goes back at all.
        gradients_there: whether an earlier micro-batch has left gradients.
        bucketed: whether DDP takes gradients as they come.
        tied: whether the head's gradient waits for the embedding's.
    """
    size = block.residual * block.tokens * block.width
    tape = Tape()
    passing = Passing(block, tape, bucketed=bucketed, gradients_there=gradients_there)
    x = tape.var(size, wants=wants)
    hidden = passing.norm(x, "norm", block.tokens, block.width)
    tape.done(x)
    own = passing.weight(
        "head", "weight", head.held * head.rows * head.width / head.gathered if head.trained else 0.0
    )
    if tied:  # waits as it is: nothing is added to what is there, nor put into a bucket
        own.grad, own.bucketed = None, False
    states = passing.enter(hidden) if block.tp > 1 else hidden
    result = loss(tape, states, head, own)
    if block.tp > 1:
        tape.done(states)
    tape.done(hidden)
    forward = _peak(tape)
    tape.done(result)
    kept = tuple(tape.live)
    _again(tape)
    result.grad = tape.new(4)
    tape.back()
    left = tape.live[GRADIENTS]
    return Passes(
        kept=kept,
        cached=NOTHING,
        forward=forward,
        backward=_peak(tape),
        gradients=left,
        highest=tuple(tape.highest),
    )
