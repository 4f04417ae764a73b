"""From an experiment to the sizes of its blocks, its loss and its weights on one rank (hpcdl.plan.block, loss)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hpcdl import compress
from hpcdl.compress import quant
from hpcdl.parallel._mesh import MeshConfig
from hpcdl.plan.adapter import ROWS
from hpcdl.plan.block import Block, Linear
from hpcdl.plan.loss import HELD_WEIGHTS, Head
from hpcdl.spec import ExperimentSpec, ModelShape
from hpcdl.spec.layout import Held, Matrix, head_dim, matrices
from hpcdl.spec.parallel import ParallelDims


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """One rank's dtypes, sizes and shares."""

    spec: ExperimentSpec
    shape: ModelShape
    device: str
    dims: ParallelDims

    # --- what the config says -----------------------------------------------------------------------------

    @cached_property
    def config(self) -> MeshConfig | None:
        """The mesh's keys; None of strategies off the mesh."""
        config = self.spec.parallel
        return config if isinstance(config, MeshConfig) else None

    @cached_property
    def frozen(self) -> bool:
        """Whether only adapters are trained."""
        return compress.freezes_base(self.spec)

    @cached_property
    def bf16(self) -> bool:
        """Whether passes run under autocast."""
        return self.spec.trainer.precision == "bf16"

    @property
    def compute(self) -> int:
        """Bytes of a number in a pass."""
        return 2 if self.bf16 else 4

    @property
    def plain(self) -> int:
        """Bytes of a weight that isn't quantized, as it is held."""
        return 2 if self.frozen and self.bf16 else 4

    @cached_property
    def sharded(self) -> bool:
        """Whether FSDP is around (hpcdl.distributed.data_parallel.wrap)."""
        dims, config = self.dims, self.config
        if config is None:
            return False
        return dims.dp_shard > 1 or config.cpu_offload or (dims.tp > 1 and dims.gradient_ranks > 1)

    @cached_property
    def shards(self) -> int:
        """Ranks that share every parameter."""
        return self.dims.dp_shard * self.dims.cp if self.sharded else 1

    @property
    def seen(self) -> int:
        """Bytes of a trained weight's number as a pass finds it: FSDP gathers in bf16."""
        return 2 if self.bf16 and (self.sharded or self.frozen) else 4

    @property
    def residual(self) -> int:
        """Bytes of a number between blocks: the embedding's."""
        return self.seen

    @property
    def adapter_seen(self) -> int:
        """Bytes of an adapter's number as a pass finds it."""
        return 2 if self.bf16 and self.sharded else 4

    @cached_property
    def split_stream(self) -> bool:
        """Sequence parallel."""
        return bool(self.dims.tp > 1 and self.config is not None and self.config.sequence_parallel)

    @cached_property
    def micro_batches(self) -> int:
        """Of a rank and step."""
        trainer = self.spec.trainer
        return max(1, trainer.global_batch_size // (trainer.micro_batch_size * self.dims.data_ranks))

    # --- weights ------------------------------------------------------------------------------------------

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Of the whole model; a block's one for each of its own."""
        return tuple(matrices(self.shape))

    def held(self, matrix: Matrix) -> Held:
        """As the quantization scheme has it."""
        if matrix.role == "embedding" and self.shape.tie_word_embeddings:
            matrix = replace(matrix, role="head")  # held as the head's key says
        return quant.get(self.spec.quant.scheme).memory(self.spec.quant, matrix, self.plain, self.compute)

    @cached_property
    def method(self) -> Any:
        """Of fine-tuning."""
        return compress.get(self.spec.peft.name)

    def share(self, matrix: Matrix) -> float:
        """Of one matrix what a tensor parallel rank has."""
        return 1.0 if matrix.role == "norm" else 1.0 / self.dims.tp

    @cached_property
    def block_bytes(self) -> float:
        """Of a block's weights, as they are held; before FSDP shares them."""
        return sum(self.held(m).bytes * self.share(m) * self.in_block(m) for m in self.matrices)

    def in_block(self, matrix: Matrix) -> int:
        """How many of it a block has."""
        if matrix.role == "block":
            return 1
        return 2 if matrix.role == "norm" else 0

    @cached_property
    def block_adapters(self) -> float:
        """Numbers of a block's adapters on this rank, before FSDP shares them."""
        return sum(self._adapter(linear) for _, linear in self.linears)

    def _adapter(self, linear: Linear) -> float:
        return (
            linear.rank * (linear.rows + linear.columns) + linear.lengths * linear.rows
            if linear.rank
            else 0.0
        )

    @cached_property
    def block_trained(self) -> float:
        """Trained numbers of a block."""
        own = 0.0 if self.frozen else sum(m.numel * self.share(m) * self.in_block(m) for m in self.matrices)
        return own + self.block_adapters

    @cached_property
    def table(self) -> Matrix:
        """The embedding."""
        return next(m for m in self.matrices if m.role == "embedding")

    @cached_property
    def head_matrix(self) -> Matrix:
        """What the logits are made with."""
        return next((m for m in self.matrices if m.role == "head"), replace(self.table, role="head"))

    @property
    def table_numel(self) -> float:
        """Numbers of the embedding on this rank; so many has the head."""
        return self.table.numel / self.dims.tp

    # --- passes -------------------------------------------------------------------------------------------

    @cached_property
    def linears(self) -> tuple[tuple[str, Linear], ...]:
        """A block's."""
        return tuple((m.name, self._linear(m)) for m in self.matrices if m.role == "block")

    def _linear(self, matrix: Matrix) -> Linear:
        tp, held = self.dims.tp, self.held(matrix)
        beside = self.method.memory(self.spec.peft, matrix)
        rounds = bool(getattr(self.spec.quant, "qat", False))
        form = "plain"
        if held.whole:
            form = "rounded" if rounds else getattr(quant.get(self.spec.quant.scheme), "FORM", "held")
        elif self.spec.prune.name != "none" and not self.frozen:
            form = "zeros"
        rows, columns = float(matrix.rows), float(matrix.columns)
        if matrix.name in ROWS:
            columns /= tp
        else:
            rows /= tp
        return Linear(
            rows=rows, columns=columns, trained=not self.frozen, held=self.seen, whole=held.whole / tp, form=form,
            rank=beside.rank, lengths=beside.lengths, dropout=beside.dropped,
        )  # fmt: skip

    @cached_property
    def block(self) -> Block:
        """Its sizes."""
        spec, shape, dims = self.spec, self.shape, self.dims
        length = spec.data.seq_len / dims.cp
        swap = bool(dims.cp > 1 and self.config is not None and self.config.cp_method == "ulysses")
        return Block(
            batch=spec.trainer.micro_batch_size,
            length=length / dims.tp if self.split_stream else length,
            keys=spec.data.seq_len,
            queries=spec.data.seq_len if swap else length,
            width=shape.hidden_size,
            heads=shape.num_attention_heads / dims.tp,
            kv_heads=shape.num_key_value_heads / dims.tp,
            head_dim=head_dim(shape),
            inner=shape.intermediate_size / dims.tp,
            compute=self.compute,
            residual=self.residual,
            norms=self.seen,
            trained_norms=not self.frozen,
            adapters=self.adapter_seen,
            linears=self.linears,
            attention="masked" if dims.cp > 1 else self._attention,
            gpu=self.device == "cuda",
            tp=dims.tp,
            split_stream=self.split_stream,
            cp=dims.cp,
            swap=swap,
        )

    @property
    def _attention(self) -> str:
        if self.spec.model.attention == "eager":
            return "eager"
        return "masked" if self.spec.data.packing else "flash"

    @cached_property
    def head(self) -> Head:
        """The loss's sizes."""
        held = self.held(self.head_matrix)
        width, vocabulary = self.shape.hidden_size, self.shape.vocab_size
        split = self.dims.tp > 1 and self.config is not None and self.config.loss_parallel
        rows = vocabulary / self.dims.tp if split else float(vocabulary)
        part = min(rows, HELD_WEIGHTS[self.device] // width) if held.whole else 0.0
        return Head(
            tokens=self.block.inside,
            width=width,
            rows=rows,
            chunk_rows=-(-vocabulary // self.dims.tp) if split else vocabulary,
            compute=self.compute,
            held=self.seen,
            trained=not self.frozen,
            part=part,
            gathered=self.dims.tp if self.dims.tp > 1 and not split else 1,
            of_a_part=held.whole * min(1.0, part / vocabulary) if part else 0.0,
            device=self.device,
        )
