"""What a process on a CPU holds outside of steps: the model as it is loaded, what sharding leaves, a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hpcdl.compress import quant
from hpcdl.plan import beside
from hpcdl.spec.held import Around

if TYPE_CHECKING:
    from hpcdl.plan.shares import Shares


@dataclass(frozen=True, kw_only=True)
class Outside:
    """Of one pipeline rank."""

    shares: Shares

    @property
    def let_go(self) -> float:
        """Under FSDP: what its shards leave of the whole model that was loaded, in pieces as large as parameters were;
        a checkpoint's copies, which no such hole takes; and gloo's copies of the largest group that is exchanged.

        Measured with two and four ranks (benchmarks/planner.py): 60 to 240 MiB beyond what a step's own pieces leave.
        """
        model = self.shares.model
        if not model.sharded or self.matrix_by_matrix:
            return 0.0
        group = max(self.shares.a_block / model.seen, self.shares.tables * model.table_numel)
        exchanged = (
            2 * model.seen + 2 * 4
        ) * group  # in and out of a gather, and of a reduce-scatter in fp32
        sizes = [(4.0 * matrix.numel, matrix.count) for matrix in model.matrices]
        kept = sum(size * count for size, count in sizes if size < beside.MAPPED)
        left = (
            kept / sum(size * count for size, count in sizes) * max(0.0, self.loading - self.shares.weights)
        )
        return left + 4 * self.shares.trained + self.shares.optimizer + exchanged

    def most(self, around: Around) -> float:
        """What the process holds outside of steps, at most: the whole model as it is loaded, copies of a checkpoint.

        At its end the first rank loads the whole model anew, beside its own part (hpcdl.worker.training.finish).
        """
        copied = 4 * self.shares.trained + self.shares.optimizer
        always = (
            self.shares.weights
            + around.weights
            + self.shares.adapters
            + self.shares.optimizer
            + around.optimizer
        )
        dims = self.shares.model.dims
        ends = self.loading if dims.world_size > dims.dp_replicate else 0.0
        result = always + ends + beside.RESULT if self.shares.rank == 0 else 0.0
        return max(self.loading, always + copied, result)

    @cached_property
    def matrix_by_matrix(self) -> bool:
        """Whether a quantized base is read from disk so (hpcdl.worker.streaming)."""
        spec = self.shares.model.spec
        return spec.model.source == "path" and spec.quant.scheme != "none" and not quant.why_whole(spec)

    @cached_property
    def loading(self) -> float:
        """Every rank reads the whole model before it is taken apart (hpcdl.worker.model.load, streaming).

        Random weights are made in fp32; a quantized base read from a folder comes matrix by matrix.
        """
        model, spec = self.shares.model, self.shares.model.spec
        if spec.model.source == "random":
            return 4.0 * sum(m.numel * m.count for m in model.matrices)
        if self.matrix_by_matrix:
            held = sum(model.held(m).bytes * m.count for m in model.matrices) - self.untouched
            return held + 2 * model.plain * max(m.numel for m in model.matrices if m.role == "block")
        return float(model.plain * sum(m.numel * m.count for m in model.matrices))

    @property
    def untouched(self) -> float:
        """Of the weights what isn't in memory: of a model mapped from disk the embedding, but for a few rows.

        With `quant.resident=layer` all but the matrix at work.
        """
        model, spec = self.shares.model, self.shares.model.spec
        if not self.matrix_by_matrix:
            return 0.0
        if getattr(spec.quant, "resident", "all") == "layer":
            return self.shares.weights - max(model.held(matrix).bytes for matrix in model.matrices)
        mapped = model.held(model.table).whole == 0 and not model.shape.tie_word_embeddings
        return model.held(model.table).bytes if mapped else 0.0
