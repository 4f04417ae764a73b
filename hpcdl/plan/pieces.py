"""How much of what a step makes comes in pieces that malloc keeps when they are freed: the others leave no holes."""

from __future__ import annotations

from collections.abc import Iterable

from hpcdl.plan.beside import MAPPED
from hpcdl.plan.decoder import Decoder
from hpcdl.plan.loss import CHUNK_LOGITS
from hpcdl.plan.tape import BUFFERS, GRADIENTS, LOGITS, Bytes

STREAM, QUERIES, KEYS, INNER = 6, 3, 2, 4
"""Of a block's tensors those of each size, about: norms, residuals and results; queries; keys; the MLP's."""


def kept(model: Decoder, made: Bytes) -> Bytes:
    """Of `made` what is in pieces below MAPPED, by kind."""
    block, head = model.block, model.head
    tokens, inside = block.residual * block.tokens, block.compute * block.inside
    stream = tokens * block.width
    of_a_block = _small(
        [
            (stream, STREAM),
            (inside * block.heads * block.head_dim, QUERIES),
            (inside * block.kv_heads * block.head_dim, KEYS),
            (inside * block.inner, INNER),
        ]
    )
    chunk = min(head.tokens, max(64, CHUNK_LOGITS[head.device] // max(1, int(head.chunk_rows))))
    of_the_loss = _small([(4 * chunk * head.rows, 2), (head.held * head.rows * head.width, 1), (stream, 1)])
    matrices = [(matrix.numel * model.share(matrix), matrix.count) for matrix in model.matrices]
    shares = dict.fromkeys(range(len(made)), of_a_block)
    shares[LOGITS] = of_the_loss
    shares[BUFFERS] = max(of_a_block, _small((model.seen * size, count) for size, count in matrices))
    shares[GRADIENTS] = _small((4 * size / model.shards, count) for size, count in matrices)
    return tuple(size * shares[kind] for kind, size in enumerate(made))


def _small(pieces: Iterable[tuple[float, int]]) -> float:
    """The share of all bytes that lies in small pieces; of (bytes, how many)."""
    every = list(pieces)
    whole = sum(size * count for size, count in every)
    return sum(size * count for size, count in every if size < MAPPED) / whole if whole else 1.0
