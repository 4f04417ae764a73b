"""What a rank has to do in one micro-batch: operations on numbers, bytes moved, and torch operations started.

Read off transformers' Llama (modeling_llama.py, 5.23), hpcdl.distributed.losses and torch's optimizers. FLOPs of
matrices: 2 a weight and token forward, 2 for the gradient of the input, 2 for that of a trained weight (Kaplan et al.,
2020; Narayanan et al., 2021, appendix). Bytes: each operation's inputs and output once, as eager torch runs them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from hpcdl import compress
from hpcdl.compress import quant
from hpcdl.distributed import stages
from hpcdl.parallel._mesh import MeshConfig, shards
from hpcdl.plan.records import Device
from hpcdl.plan.time_constants import (
    BACKWARD_MOVED,
    CHUNK_LOGITS,
    CLIP_BYTES,
    DEQUANTIZE,
    FUSED,
    HOST_BYTES_PER_S,
    IN_PLACE,
    MASKED,
    OPERATIONS,
    OPTIMIZER_BYTES,
    PARKING_BYTES_PER_S,
    SLOW_8BIT,
    STATE_NUMBERS,
    WRAPPED,
)
from hpcdl.plan.time_pass import Pass
from hpcdl.spec import ExperimentSpec, ModelShape
from hpcdl.spec.layout import Beside, Held, Matrix, head_dim, matrices
from hpcdl.spec.parallel import ParallelDims
from hpcdl.spec.traffic import Sizes


@dataclass(frozen=True)
class Work:
    """One rank's share of a step; seconds where nothing is said."""

    spec: ExperimentSpec
    shape: ModelShape
    dims: ParallelDims
    device: Device

    # --- what the config says -----------------------------------------------------------------------------

    @cached_property
    def frozen(self) -> bool:
        """Whether only adapters are trained."""
        return compress.freezes_base(self.spec)

    @cached_property
    def compute(self) -> int:
        """Bytes of a number in a pass."""
        return 2 if self.spec.trainer.precision == "bf16" else 4

    @cached_property
    def residual(self) -> int:
        """Bytes of a number of the residual stream."""
        mesh = isinstance(self.spec.parallel, MeshConfig) and shards(self.spec.parallel, self.dims)
        return 2 if self.compute == 2 and (self.frozen or mesh) else 4

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch on this rank."""
        return max(1, self.spec.trainer.micro_batch_size * self.spec.data.seq_len // self.dims.cp)

    @cached_property
    def micro_batches(self) -> int:
        """Of a step on this rank."""
        trainer = self.spec.trainer
        return max(1, trainer.global_batch_size // (trainer.micro_batch_size * self.dims.data_ranks))

    @cached_property
    def passes(self) -> float:
        """Forward passes of a block a micro-batch, on average."""
        return {"none": 1.0, "selective": 1.5, "full": 2.0}[self.spec.trainer.activation_checkpointing]

    @cached_property
    def _rate(self) -> float:
        precision = self.spec.trainer.precision
        return self.device.peak_flops[precision] * self.device.efficiency[precision] * self.device.share

    @cached_property
    def _bandwidth(self) -> float:
        return self.device.memory_bytes_per_s * self.device.share

    def _product(self, tokens: float, rows: float, columns: float) -> float:
        """Seconds of a matrix product: of its operations, or of its operands where they take longer (roofline)."""
        computing = 2 * tokens * rows * columns / self._rate
        if self.device.kind == "cpu":  # oneDNN packs the weights first
            return computing + self.compute * rows * columns / self._bandwidth
        moved = self.compute * (tokens * (rows + columns) + rows * columns)
        return max(computing, moved / self._bandwidth)

    # --- a block ------------------------------------------------------------------------------------------

    @cached_property
    def _matrices(self) -> list[tuple[Matrix, Beside, Held]]:
        method, scheme = compress.get(self.spec.peft.name), quant.get(self.spec.quant.scheme)
        plain = 2 if self.frozen and self.compute == 2 else 4
        return [
            (m, method.memory(self.spec.peft, m), scheme.memory(self.spec.quant, m, plain, self.compute))
            for m in matrices(self.shape)
        ]

    @cached_property
    def _of_block(self) -> list[tuple[Matrix, Beside, Held]]:
        return [found for found in self._matrices if found[0].role == "block"]

    @property
    def heads_width(self) -> tuple[float, float]:
        """Numbers a token of queries, and of keys and values together, of this rank's heads."""
        each = head_dim(self.shape) / self.dims.tp
        return self.shape.num_attention_heads * each, 2 * self.shape.num_key_value_heads * each

    @cached_property
    def _attention(self) -> float:
        """Seconds of attention forward; half where a kernel knows that it is causal and skips the rest."""
        spec = self.spec
        masked = spec.data.packing or self.dims.cp > 1 or spec.model.attention == "eager"
        queries = self.heads_width[0]
        flops = 4.0 * self.tokens * spec.data.seq_len * queries * (1.0 if masked else 0.5)
        moved = 4 * self.compute * self.tokens * queries
        heads = self.shape.num_attention_heads / self.dims.tp
        scores = self.tokens * spec.data.seq_len * heads
        if spec.model.attention == "eager":  # scores are written, masked, cast, normalised and read
            moved += scores * 30
        rate = self._rate * self.device.efficiency.get("attention", 0.5)
        if (
            masked and self.device.kind == "cuda"
        ):  # no FlashAttention with a mask: the memory-efficient kernel
            rate *= MASKED
        return flops / rate + moved / self._bandwidth

    @cached_property
    def _elementwise(self) -> float:
        """Bytes that a block's norms, rotary embedding, activation, sums and casts move forward."""
        tokens, width, e, r = self.tokens, self.shape.hidden_size, self.compute, self.residual
        stream: float = tokens * width
        if self.dims.tp > 1 and getattr(self.spec.parallel, "sequence_parallel", False):
            stream /= self.dims.tp
        queries, keys = self.heads_width
        inner = self.shape.intermediate_size / self.dims.tp
        norms = 2 * (28 + 4 * r) * stream
        sums = 2 * 3 * r * stream
        casts = 5 * (r + e) * tokens * width if r != e else 0
        rotary = 10 * e * tokens * (queries + keys / 2)
        repeated = 2 * e * tokens * (queries + keys) if self.spec.data.packing else 0
        mlp = 5 * e * tokens * inner
        return norms + sums + casts + rotary + repeated + mlp

    @cached_property
    def _adapters(self) -> tuple[float, float, int]:
        """Of a block: seconds of products forward, bytes moved forward, and how many matrices are adapted."""
        rank = getattr(self.spec.peft, "rank", 0)
        seconds = moved = 0.0
        count = 0
        for matrix, beside, _ in self._of_block:
            if not beside.parameters:
                continue
            count += 1
            rows, columns = matrix.rows / self.dims.tp, matrix.columns
            seconds += self._product(self.tokens, rank, columns) + self._product(self.tokens, rows, rank)
            moved += self.tokens * ((4 + self.compute) * columns + 4 * self.compute * rows)
        return seconds, moved, count

    @cached_property
    def _whole(self) -> float:
        """Seconds to make a block's quantized weights whole once."""
        factor = DEQUANTIZE[self.device.kind] / self._bandwidth
        return sum(
            factor * (held.bytes + self.compute * matrix.numel)
            for matrix, _, held in self._of_block
            if held.whole
        )

    @cached_property
    def _products(self) -> float:
        """Seconds of a block's own matrices forward; backward as much for each of the two gradients."""
        tp = self.dims.tp
        return sum(
            self._product(self.tokens, matrix.rows / tp, matrix.columns) for matrix, *_ in self._of_block
        )

    @cached_property
    def _wrapped(self) -> float:
        """Operations that strategies add to each pass of a block."""
        config, found = self.spec.parallel, 0.0
        if isinstance(config, MeshConfig):
            found += WRAPPED["fsdp"] * shards(config, self.dims)
            found += WRAPPED["tp"] * (self.dims.tp > 1) + WRAPPED["cp"] * (self.dims.cp > 1)
        return found + WRAPPED["autocast"] * (self.compute == 2)

    @cached_property
    def forward(self) -> Pass:
        """A block."""
        seconds, moved, count = self._adapters
        fused = FUSED if self.spec.trainer.compile else 1.0
        operations = (OPERATIONS["block"] + count * OPERATIONS["adapter"]) * fused
        return Pass(
            flops=self._products + self._attention + seconds,
            moved=(self._elementwise + moved) * fused / self._bandwidth + self._whole + self._parked,
            operations=operations + self._wrapped,
        )

    @cached_property
    def again(self) -> Pass:
        """A block that is computed again."""
        return self.forward + Pass(operations=WRAPPED["recompute"])

    @cached_property
    def backward(self) -> Pass:
        """A block, without its recomputation; attention computes its scores again (FlashAttention-2, 2.5 times)."""
        seconds, moved, count = self._adapters
        fused = FUSED if self.spec.trainer.compile else 1.0
        times = 1 if self.frozen else 2
        operations = (OPERATIONS["backward"] + 2 * count * OPERATIONS["adapter"]) * fused
        return Pass(
            flops=times * self._products + 2.5 * self._attention + 2 * seconds,
            moved=BACKWARD_MOVED * (self._elementwise + moved) * fused / self._bandwidth
            + self._whole
            + self._parked
            + self._gradients,
            operations=operations + self._wrapped,
        )

    @cached_property
    def weights_share(self) -> float:
        """Of a block's backward pass, what the gradients of weights take: a schedule may put it off."""
        return 0.0 if self.frozen else self._products / max(self.backward.device_s, 1e-30)

    @cached_property
    def _gradients(self) -> float:
        """Seconds to cast a block's weights and gradients, and to add the gradients up."""
        numbers: float = sum(beside.parameters for _, beside, _ in self._of_block)
        if not self.frozen:
            numbers += sum(matrix.numel for matrix, *_ in self._of_block)
        numbers /= self.dims.tp
        moved = 12.0 * (self.micro_batches > 1) + (12.0 if self.compute == 2 else 0.0)
        return moved * numbers / (self._bandwidth * IN_PLACE[self.device.kind])

    @cached_property
    def _parked(self) -> float:
        """Seconds in which a block's input goes to the host or the disk, or comes back."""
        where = self.spec.trainer.activation_offload
        if where == "none" or (where == "host" and self.device.kind == "cpu"):
            return 0.0
        return self.tokens * self.residual * self.shape.hidden_size / PARKING_BYTES_PER_S[where]

    # --- what stands at the ends --------------------------------------------------------------------------

    @cached_property
    def head(self) -> Pass:
        """The loss with its gradients, which its forward pass takes (hpcdl.distributed.losses)."""
        rows: float = self.shape.vocab_size
        if getattr(self.spec.parallel, "loss_parallel", False):
            rows /= self.dims.tp
        times = 2 if self.frozen else 3
        chunk = CHUNK_LOGITS[self.device.kind] / rows
        moved = self.tokens * rows * (2 * self.compute + 24) + (
            0 if self.frozen else 8 * rows * self.shape.hidden_size
        )
        return Pass(
            flops=times * self._product(self.tokens, rows, self.shape.hidden_size),
            moved=moved / self._bandwidth,
            operations=OPERATIONS["head"] * math.ceil(self.tokens / chunk),
        )

    @cached_property
    def embedding(self) -> Pass:
        """Looked up, and its gradient, which is dense."""
        moved: float = 3 * self.residual * self.tokens * self.shape.hidden_size
        if not self.frozen:
            moved += 8 * self.shape.vocab_size * self.shape.hidden_size / self.dims.tp
        return Pass(moved=moved / self._bandwidth, operations=OPERATIONS["edge"])

    # --- stages -------------------------------------------------------------------------------------------

    @cached_property
    def stages(self) -> list[list[int]]:
        """Blocks of each stage, by rank of the pipeline."""
        config, ranks, blocks = self.spec.parallel, self.dims.pp, self.shape.num_hidden_layers
        if ranks == 1 or not isinstance(config, MeshConfig):
            return [[blocks]]
        schedule = stages.SCHEDULES[config.schedule]
        count = ranks * stages.stages_per_rank(config.schedule, config.stages_per_rank)
        head = stages.head_cost(self.shape) / stages.block_cost(self.shape, self.spec.data.seq_len)
        parts = stages.shares(blocks, count, head)
        return [
            [parts[stage] for stage in stages.held_by(schedule.placement, rank, ranks, count)]
            for rank in range(ranks)
        ]

    # --- the optimizer ------------------------------------------------------------------------------------

    @cached_property
    def numbers(self) -> tuple[float, float, float]:
        """Of the busiest rank before sharding over data: of a block, of what stands outside, and those trained."""
        tp, pp = self.dims.tp, self.dims.pp
        block = sum(matrix.numel for matrix, *_ in self._of_block) / tp + 2 * self.shape.hidden_size
        ends = sum(m.numel / tp for m, *_ in self._matrices if m.role in ("embedding", "head"))
        if pp > 1 and not self.shape.tie_word_embeddings:
            ends /= 2
        ends += self.shape.hidden_size  # the last norm
        blocks = max(sum(rank) for rank in self.stages)
        if self.frozen:
            trained = blocks * sum(beside.parameters for _, beside, _ in self._of_block) / tp
        else:
            trained = blocks * block + ends
        return block, ends, trained

    @cached_property
    def shard(self) -> int:
        """Ranks that share each trained number."""
        return self.dims.dp_shard * self.dims.cp if self.dims.dp_shard > 1 else 1

    @cached_property
    def optimizer_s(self) -> float:
        """The step and clipping; with parameters in host memory the host takes it."""
        name, own = self.spec.optim.name, self.numbers[2] / self.shard
        moved = OPTIMIZER_BYTES[name] * (SLOW_8BIT[self.device.kind] if name == "adamw8bit" else 1.0)
        moved += CLIP_BYTES[self.spec.trainer.max_grad_norm is not None]
        bandwidth = self._bandwidth * IN_PLACE[self.device.kind]
        if self.device.kind == "cuda" and getattr(self.spec.parallel, "cpu_offload", False):
            bandwidth = HOST_BYTES_PER_S
        return own * moved / bandwidth

    def from_host_s(self, computing: float) -> float:
        """Seconds that a step waits for parameters that lie in host memory (FSDP's cpu_offload), on a GPU.

        They come for each pass, ahead of it: what takes longer than computing shows. Gradients go when they are there.
        """
        if self.device.kind == "cpu" or not getattr(self.spec.parallel, "cpu_offload", False):
            return 0.0
        block, ends, trained = self.numbers
        blocks = max(sum(rank) for rank in self.stages)
        coming = 2 * self.micro_batches * (2 if self.frozen else 4) * (blocks * block + ends) / self.shard
        rate = PARKING_BYTES_PER_S["host"]
        return max(0.0, coming / rate - computing) + 4 * trained / self.shard * self.micro_batches / rate

    @cached_property
    def tensors(self) -> float:
        """Trained tensors on this rank."""
        blocks = max(sum(rank) for rank in self.stages)
        count = sum(2 for _, beside, _ in self._of_block if beside.parameters) if self.frozen else 9
        return blocks * count + (0 if self.frozen else 3)

    # --- what strategies ask ------------------------------------------------------------------------------

    @cached_property
    def sizes(self) -> Sizes:
        """For `traffic()` of the strategy."""
        block, ends, trained = self.numbers
        queries, keys = self.heads_width
        plain = 2 if self.compute == 2 else 4
        held = sum(held.bytes for _, _, held in self._of_block) / sum(m.numel for m, *_ in self._of_block)
        shape = self.shape
        tied = shape.vocab_size * shape.hidden_size if shape.tie_word_embeddings and not self.frozen else 0
        return Sizes(
            dims=self.dims,
            tokens=self.tokens,
            micro_batches=self.micro_batches,
            blocks=max(sum(rank) for rank in self.stages),
            width=shape.hidden_size,
            kv_width=keys,
            kv_heads=max(1, shape.num_key_value_heads // self.dims.tp),
            query_width=queries,
            compute=self.compute,
            residual=self.residual,
            block_weights=block,
            block_bytes=min(held, plain) if self.frozen else plain,
            end_weights=ends,
            end_bytes=plain,
            trained=trained,
            tied=tied / self.dims.tp / self.shard if self.dims.pp > 1 else 0.0,
            state=STATE_NUMBERS.get(self.spec.optim.name, 2.0),
            passes=self.passes,
        )
