"""A block's attention over its own sequence, told to a Tape: transformers' sdpa_attention.py and eager attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcdl.plan import across
from hpcdl.plan.tape import Var

if TYPE_CHECKING:
    from hpcdl.plan.block import Passing


def softmax(passing: Passing, query: Var, key: Var, value: Var, numbers: dict[str, float]) -> Var:
    """Scaled dot product attention; what it is given is used up."""
    block, tape, e = passing.block, passing.tape, passing.block.compute
    if block.cp > 1:
        return across.attend(passing, query, key, value)
    if block.attention == "eager":
        return _eager(passing, query, key, value, numbers)
    if block.attention == "masked" and block.heads > block.kv_heads:
        repeated = [
            _repeat(passing, each, each.bytes * block.heads / block.kv_heads) for each in (key, value)
        ]
        tape.done(key, value)
        key, value = repeated
    ready = [
        passing.cast(each, e * count)
        for each, count in zip(
            (query, key, value),
            (numbers["q"], key.store.bytes / _width(passing, key, numbers), value.bytes / e),
            strict=True,
        )
    ]
    sums = tape.new(4 * block.batch * block.heads * block.queries)
    saves = [*(each.store for each in ready), sums]
    mask = None
    if block.attention == "masked":
        mask = tape.new(e * block.batch * block.queries * block.keys)
        saves.append(mask)
    out = tape.op(
        e * numbers["q"],
        to=[(each, each.bytes) for each in ready],
        saves=saves,
        inside=_going_back(passing),
    )
    passing.save_own(out)
    tape.done(*ready, query, key, value)
    tape.drop(sums)
    if mask is not None:
        tape.drop(mask)
    return out


def _going_back(passing: Passing) -> float:
    """What flash attention takes on a GPU on its way back.

    The queries' gradient in fp32, and where heads share keys the keys' for each head (flash-attention,
    csrc/flash_attn/flash_api.cpp, mha_bwd).
    """
    block = passing.block
    if not block.gpu:
        return 0.0
    each = block.batch * block.queries * block.heads * block.head_dim
    return 4 * each + (2 * block.compute * each if block.heads > block.kv_heads else 0.0)


def _width(passing: Passing, key: Var, numbers: dict[str, float]) -> float:
    """Bytes of a number of the turned keys."""
    count = numbers["q"] if passing.block.attention == "masked" else numbers["k"]
    return key.bytes / count


def _repeat(passing: Passing, x: Var, size: float) -> Var:
    """repeat_kv: each head for the queries that share it."""
    return passing.tape.op(size, to=[(x, x.bytes)])


def _eager(passing: Passing, query: Var, key: Var, value: Var, numbers: dict[str, float]) -> Var:
    """eager_attention_forward: the scores are kept."""
    block, tape, e = passing.block, passing.tape, passing.block.compute
    scores = block.batch * block.heads * block.queries * block.keys
    if block.heads > block.kv_heads:
        repeated = [
            _repeat(passing, each, each.bytes * block.heads / block.kv_heads) for each in (key, value)
        ]
        tape.done(key, value)
        key, value = repeated
    wide = query.bytes / numbers["q"]
    ready = [passing.cast(each, e * numbers["q"]) for each in (query, key)]
    raw = tape.op(e * scores, to=[(each, each.bytes) for each in ready], saves=[each.store for each in ready])
    tape.done(*ready)
    scaled = tape.op(e * scores, to=[(raw, e * scores)])
    tape.done(raw)
    mask = max(e, block.residual)
    masked = tape.op(mask * scores, to=[(scaled, -1)])
    tape.done(scaled)
    weights = tape.op(4 * scores, to=[(masked, mask * scores)])
    passing.save_own(weights)
    cast = passing.cast(weights, wide * scores)
    narrow = [passing.cast(cast, e * scores), passing.cast(value, e * numbers["q"])]
    out = tape.op(
        e * numbers["q"],
        to=[(each, each.bytes) for each in narrow],
        saves=[each.store for each in narrow],
    )
    tape.done(*narrow, cast, weights, masked, query, key, value)
    laid = tape.op(e * numbers["q"], to=[(out, out.bytes)])
    tape.done(out)
    return laid
