"""Attention over the other ranks' part of the sequence, told to a Tape (hpcdl.distributed.context, line by line)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hpcdl.plan.tape import TEMPORARY, Var

if TYPE_CHECKING:
    from hpcdl.plan.block import Passing


def attend(passing: Passing, query: Var, key: Var, value: Var) -> Var:
    """What this rank's tokens get; what is given is used up."""
    block, tape, e = passing.block, passing.tape, passing.block.compute
    chunk = block.batch * block.length * (block.tp if block.split_stream else 1) * block.head_dim
    ready = [
        passing.cast(each, e * chunk * heads)
        for each, heads in ((query, block.heads), (key, block.kv_heads), (value, block.kv_heads))
    ]
    out = (_swapped if block.swap else _gathered)(passing, ready, chunk)
    tape.done(*ready, query, key, value)
    return out


def _gathered(passing: Passing, ready: list[Var], chunk: float) -> Var:
    """Keys and values of all chunks."""
    block, tape, e = passing.block, passing.tape, passing.block.compute
    query, key, value = ready
    both = tape.op(2 * key.bytes, to=[(key, key.bytes), (value, value.bytes)])
    size = block.cp * both.bytes
    summed = 4 / e * (size + both.bytes)  # added up in fp32
    chunks = tape.op(size, to=[(both, both.bytes)], passing=(summed, TEMPORARY))
    whole = tape.op(size, to=[(chunks, -1)])
    out = _softmax(passing, query, [whole], size / 2, block.heads, block.kv_heads, chunk)
    tape.done(both, chunks, whole)
    return out


def _swapped(passing: Passing, ready: list[Var], chunk: float) -> Var:
    """All sequence, some heads."""
    block, tape = passing.block, passing.tape
    repeats = math.lcm(int(block.kv_heads), block.cp) // int(block.kv_heads)
    heads = [ready[0], *(_repeated(passing, each, repeats) for each in ready[1:])]
    theirs = _exchanged(passing, heads)
    laid = [tape.op(each.bytes, to=[(each, -1)]) for each in theirs]
    kv_heads = block.kv_heads * repeats / block.cp
    out = _softmax(
        passing, laid[0], laid[1:], laid[1].bytes, block.heads / block.cp, kv_heads, chunk * block.cp
    )
    tape.done(*theirs, *laid, *heads)
    (mine,) = _exchanged(passing, [out])
    tape.done(out)
    flat = tape.op(mine.bytes, to=[(mine, -1)])
    turned = tape.op(mine.bytes, to=[(flat, -1)])
    tape.done(mine, flat)
    return turned


def _exchanged(passing: Passing, parts: list[Var]) -> list[Var]:
    """Each part split, all in one message, and taken apart again."""
    tape = passing.tape
    stacked = [tape.op(each.bytes, to=[(each, each.bytes)]) for each in parts]
    size = sum(each.bytes for each in stacked)
    rows = tape.op(size, to=[(each, each.bytes) for each in stacked])
    came = tape.op(size, to=[(rows, size)], passing=(size, TEMPORARY))
    found = [tape.op(each.bytes, to=[(came, size)]) for each in stacked]
    tape.done(*stacked, rows, came)
    return found


def _repeated(passing: Passing, x: Var, count: int) -> Var:
    """Held by the caller."""
    if count == 1:
        x.store.refs += 1
        return x
    return passing.tape.op(x.bytes * count, to=[(x, x.bytes)])


def _softmax(
    passing: Passing, query: Var, others: list[Var], size: float, heads: float, kv_heads: float, chunk: float
) -> Var:
    """With a mask of its own: keys repeated for the queries that share them; `others` holds keys and values.

    Args:
        passing: the block on its way.
        query: what asks.
        others: keys and values, each or both in one.
        size: bytes of the keys.
        heads: of the queries.
        kv_heads: of the keys.
        chunk: numbers of one head's queries.
    """
    block, tape, e = passing.block, passing.tape, passing.block.compute
    times = heads / kv_heads
    keys, values = others[0], others[-1]
    repeated = []
    if times > 1:
        # a gradient of one half is as large as both where they lie in one
        repeated = [tape.op(size * times, to=[(each, each.bytes)]) for each in (keys, values)]
        keys, values = repeated
    sums = tape.new(4 * block.batch * heads * block.queries)
    mask = tape.new(e * block.batch * block.queries * block.keys)
    saves = [query.store, keys.store, sums, mask] + ([values.store] if values is not keys else [])
    to = [(query, query.bytes), (keys, size * times)] + (
        [(values, size * times)] if repeated or values is not keys else []
    )
    if values is keys:
        to = [(query, query.bytes), (keys, keys.bytes)]
    out = tape.op(e * chunk * heads, to=to, saves=saves)
    passing.save_own(out)
    tape.done(*repeated)
    tape.drop_all([sums, mask])
    return out
