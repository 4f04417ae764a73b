"""Where the bytes of a training step will go on one rank, in closed form.

Each method says its own part (`memory()` beside its `apply()`: hpcdl.compress, hpcdl.compress.quant); here they
are put together with what the decoder and the loop need. Bytes are those of tensors, as the worker measures them
(hpcdl.worker.storages), but for `runtime`.

What a block keeps for its backward pass was read off transformers' Llama (modeling_llama.py, 5.23) with SDPA's
fused kernels: a residual, q, k, v and the result of attention, gate, silu(gate), up and their product, what norms
keep, and each trained matrix's input. Recomputation: Chen et al., "Training Deep Nets with Sublinear Memory Cost",
2016; the form of the sum: Korthikanti et al., "Reducing Activation Recomputation", 2022, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from hpcdl import compress, tasks
from hpcdl.compress import offload, quant
from hpcdl.parallel._mesh import MeshConfig
from hpcdl.plan.records import RankMemory
from hpcdl.spec import ExperimentSpec, ModelShape
from hpcdl.spec.layout import Held, Matrix, head_dim, matrices
from hpcdl.spec.parallel import ParallelDims

CATEGORIES = {
    "weights": "the model's own, as they are held",
    "adapters": "trained beside a frozen base",
    "gradients": "of what is trained",
    "optimizer": "its state",
    "activations": "kept from the forward pass for the backward pass",
    "recomputed": "a block's, computed again (activation checkpointing)",
    "logits": "of a chunk of tokens, and the loss's own gradients",
    "buffers": "weights made whole, cast or gathered while they are used",
    "temporary": "what passes from one operation to the next",
}
"""What is planned and measured, and what it means."""

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
HELD_WEIGHTS = {"cpu": 2**25, "cuda": 2**27}
"""As hpcdl.distributed.losses has them (which imports torch); a test compares them."""
RUNTIME_BYTES = 480 * 2**20
"""Resident memory of a worker before its model: Python, torch for CPUs, transformers, peft, numpy and what they map.

Measured on Linux with torch 2.13, transformers 5.23 and peft 0.21: 455–510 MiB. Other libraries need more.
"""
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "sgd": 4.0}
"""Of optimizer state a trained number, fp32; without momentum SGD has none."""


def memory(spec: ExperimentSpec, device: str = "cpu", world_size: int | None = None) -> dict[str, int] | None:
    """Bytes of one training step on the first rank, by category; `tensors` and `peak` are at the highest moment.

    Args:
        spec: the experiment, validated.
        device: `cpu` or `cuda`: how much of the logits is made at a time.
        world_size: ranks, where they are others than the cluster section says.

    Returns:
        CATEGORIES, each at its own highest, `tensors` (the most that is there at once; less than the sum), `runtime`
        and `peak`. None where no closed form is known: dimensions that nobody has told (weights from the
        hub), strategies off the mesh, optimizers of unknown state.
    """
    shape = spec.model.shape
    if shape is None or not isinstance(spec.parallel, MeshConfig) or spec.optim.name not in STATE_BYTES:
        return None
    if not getattr(tasks.get(spec.task.name), "PLANNED", True):
        return None
    streamed = offload.get(spec.offload.name).memory(spec.offload, spec)
    if streamed is not None:
        return _of_a_way(streamed)
    if spec.model.attention != "sdpa" or spec.trainer.compile:
        return None
    dims = ParallelDims.fill(spec.parallel, world_size or spec.cluster.world_size)
    return _Step(spec, shape, device, dims).bytes()


def _of_a_way(streamed: dict[str, int]) -> dict[str, int]:
    """What a way of offloading says of itself adds up to the peak."""
    runtime = streamed.get("process", RUNTIME_BYTES)
    found = {name: streamed.get(name, 0) for name in CATEGORIES}
    tensors = sum(found.values())
    return {**found, "tensors": tensors, "runtime": runtime, "peak": tensors + runtime}


@dataclass(frozen=True)
class _Step:
    """One step of one rank: the sizes that everything else is made of."""

    spec: ExperimentSpec
    shape: ModelShape
    device: str
    dims: ParallelDims

    # --- what the config says -----------------------------------------------------------------------------

    @cached_property
    def frozen(self) -> bool:
        return compress.freezes_base(self.spec)

    @property
    def bf16(self) -> bool:
        return self.spec.trainer.precision == "bf16"

    @property
    def compute(self) -> int:
        """Bytes of a number in a pass."""
        return 2 if self.bf16 else 4

    @property
    def plain(self) -> int:
        """Bytes of a weight that isn't quantized."""
        return 2 if self.frozen and self.bf16 else 4

    @property
    def residual(self) -> int:
        """Bytes of a number between blocks: the embedding's, which FSDP casts when it gathers."""
        return 2 if self.bf16 and (self.frozen or self.fsdp > 1) else 4

    @property
    def fsdp(self) -> int:
        """Ranks that share every parameter."""
        return self.dims.dp_shard * self.dims.cp if self.dims.dp_shard > 1 else 1

    @property
    def tokens(self) -> int:
        """Of a micro-batch on this rank."""
        return self.spec.trainer.micro_batch_size * self.spec.data.seq_len // self.dims.cp

    @property
    def micro_batches(self) -> int:
        trainer = self.spec.trainer
        return max(1, trainer.global_batch_size // (trainer.micro_batch_size * self.dims.data_ranks))

    # --- what is there all the time -----------------------------------------------------------------------

    @cached_property
    def matrices(self) -> list[tuple[Matrix, float]]:
        """Every weight, and which share of its copies is this rank's: the first stage has the embedding."""
        dims, found = self.dims, []
        for matrix in matrices(self.shape):
            share = 1.0
            if matrix.role in ("block", "norm"):
                share /= dims.pp
            if matrix.role == "block" or (matrix.role in ("embedding", "head") and dims.tp > 1):
                share /= dims.tp
            if matrix.role == "head" and dims.pp > 1:
                continue
            found.append((matrix, share * matrix.count))
        return found

    def held(self, matrix: Matrix) -> Held:
        if matrix.role == "embedding" and self.shape.tie_word_embeddings:
            matrix = replace(matrix, role="head")  # held as the head's key says
        scheme = quant.get(self.spec.quant.scheme)
        return scheme.memory(self.spec.quant, matrix, self.plain, self.compute)

    @cached_property
    def weights(self) -> float:
        return sum(self.held(matrix).bytes * count for matrix, count in self.matrices) / self.fsdp

    @cached_property
    def adapter_numbers(self) -> float:
        method = compress.get(self.spec.peft.name)
        return sum(
            method.memory(self.spec.peft, matrix).parameters * count for matrix, count in self.matrices
        )

    @cached_property
    def trained_numbers(self) -> float:
        """On this rank, after sharding."""
        whole = self.adapter_numbers
        if not self.frozen:
            whole += sum(matrix.numel * count for matrix, count in self.matrices)
        return whole / self.fsdp

    @property
    def optimizer(self) -> float:
        optim = self.spec.optim
        return (
            0.0
            if optim.name == "sgd" and not optim.momentum
            else STATE_BYTES[optim.name] * self.trained_numbers
        )

    @property
    def untouched(self) -> float:
        """Of the weights what isn't in memory: of a model mapped from disk the embedding, but for a few rows.

        With `quant.resident=layer` all but the matrix at work.
        """
        spec = self.spec
        if self.device != "cpu" or spec.model.source != "path" or spec.quant.scheme == "none":
            return 0.0
        if quant.why_whole(spec):
            return 0.0
        if getattr(spec.quant, "resident", "all") == "layer":
            return self.weights - max(self.held(matrix).bytes for matrix, _ in self.matrices)
        embedding = next(matrix for matrix, _ in self.matrices if matrix.role == "embedding")
        mapped = self.held(embedding).whole == 0 and not self.shape.tie_word_embeddings
        return self.held(embedding).bytes if mapped else 0.0

    # --- what a step makes --------------------------------------------------------------------------------

    def trains(self, *names: str) -> list[Matrix]:
        """Those of the block's matrices whose input is kept, since they or what is beside them is trained."""
        method = compress.get(self.spec.peft.name)
        return [
            matrix
            for matrix, _ in self.matrices
            if matrix.name in names and (not self.frozen or method.memory(self.spec.peft, matrix).parameters)
        ]

    @cached_property
    def block(self) -> float:
        """Bytes that one block keeps, without the residual that came in."""
        shape, e, width = self.shape, self.compute, self.shape.hidden_size
        tp = self.dims.tp
        queries = shape.num_attention_heads * head_dim(shape) / tp
        keys = shape.num_key_value_heads * head_dim(shape) / tp
        inner = shape.intermediate_size / tp
        method = compress.get(self.spec.peft.name)
        norms = 2 * 4 + 4 * width + (4 * width if self.residual < 4 else 0)
        norms += 0 if self.frozen else 2 * self.residual * width
        inputs = self._inputs(("q_proj", "k_proj", "v_proj"), width)
        inputs += self._inputs(("gate_proj", "up_proj"), width)
        if self.bf16 and self.frozen:  # what went into o_proj is cast to fp32 and back, by peft and autocast
            inputs += e * queries * len(self.trains("o_proj"))
        if (
            self.spec.data.packing
        ):  # documents in a row: a mask of numbers, and keys repeated for each query head
            keys, mask = queries, e * self.spec.data.seq_len
        else:
            mask = 0
        attention = e * (2 * queries + 2 * keys) + 4 * shape.num_attention_heads / tp + mask
        mlp = e * inner * (3 + len(self.trains("down_proj")))
        beside = sum(
            method.memory(self.spec.peft, matrix).kept * e
            for matrix, _ in self.matrices
            if matrix.role == "block"
        )
        return self.tokens * (norms + inputs + attention + mlp + beside)

    def _inputs(self, names: tuple[str, ...], width: int) -> float:
        """Of matrices with one input: kept once, but autocast makes each a copy of its own."""
        count = len(self.trains(*names))
        separate = self.bf16 and (self.frozen or self.residual == 4)
        return self.compute * width * (count if separate else min(count, 1))

    @property
    def layers(self) -> float:
        return self.shape.num_hidden_layers / self.dims.pp

    @property
    def between(self) -> float:
        """The residual that comes into a block."""
        return self.tokens * self.residual * self.shape.hidden_size

    @property
    def own_residual(self) -> float:
        """What a block keeps of it: the norm's input, itself in fp32, a copy else (which `block` has)."""
        return self.between if self.residual == 4 else 0.0

    @cached_property
    def activations(self) -> float:
        """When the forward pass is done; a pipeline's first rank has as many micro-batches in it as stages."""
        how = self.spec.trainer.activation_checkpointing
        if self.spec.trainer.activation_offload != "none":
            return 0.0
        whole = self.block + self.own_residual
        each = {
            "none": self.layers * whole,
            "full": self.layers * self.between,
            "selective": self.layers // 2 * whole + (self.layers - self.layers // 2) * self.between,
        }[how]
        under = min(self.dims.pp, self.micro_batches)
        found = under * each + self.ends
        if how != "full":
            found += self.rotary
            # nothing before the first block's matrices is trained: its first norm keeps nothing
            if self.frozen and how == "none":
                found -= self.tokens * (4 * self.shape.hidden_size + 4)
        return found

    @property
    def ends(self) -> float:
        """What the last norm keeps."""
        if self.dims.pp > 1:
            return 0.0
        return self.tokens * (4 * self.shape.hidden_size + 4) + (0 if self.frozen else self.between)

    @property
    def rotary(self) -> float:
        return 2 * self.tokens * head_dim(self.shape) * self.residual

    @property
    def recomputed(self) -> float:
        return 0.0 if self.spec.trainer.activation_checkpointing == "none" else self.block

    @cached_property
    def logits(self) -> float:
        """In the loss: chunked (hpcdl.distributed.losses)."""
        if self.dims.pp > 1:
            return 0.0
        width, rows, e = self.shape.hidden_size, self.shape.vocab_size / self.dims.tp, self.compute
        head = next(
            matrix for matrix in reversed(list(matrices(self.shape))) if matrix.role in ("head", "embedding")
        )
        if self.held(head).whole:  # a head in few bits is made whole part by part
            part = min(rows, HELD_WEIGHTS[self.device] / width)
            chunk = min(self.tokens, max(64, CHUNK_LOGITS[self.device] // int(part)))
            return (2 * self.tokens + part) * width * e + chunk * (part * (4 + e) + width * (8 + e))
        chunk = min(self.tokens, max(64, CHUNK_LOGITS[self.device] // int(rows)))
        found = 2 * self.tokens * width * e + chunk * rows * (4 + (2 if e == 2 else 0))
        if self.frozen:
            return found + chunk * width * e
        cast = rows * width * e if self.plain != e and self.fsdp == 1 else 0.0
        return found + rows * width * (4 + e) + cast

    @cached_property
    def buffers(self) -> float:
        """Weights in another form than they are held in."""
        blocks = [matrix for matrix, _ in self.matrices if matrix.role == "block"]
        whole = max(self.held(matrix).whole for matrix in blocks) / self.dims.tp
        if self.fsdp > 1:  # this block and the next, and what stands outside the blocks
            a_block = sum(matrix.numel for matrix in blocks) / self.dims.tp
            ends = sum(m.numel * count for m, count in self.matrices if m.role in ("embedding", "head"))
            return self.compute * (2 * a_block + ends) + whole
        if self.bf16:  # autocast keeps what it has cast of trained weights to the end of the pass
            cast = 0.0 if self.frozen else sum(m.numel * n for m, n in self.matrices if m.role == "block")
            return 2 * (cast + self.adapter_numbers) + whole
        return whole

    @property
    def temporary(self) -> float:
        """The backward pass of the MLP: a few gradients of its width, and one of a matrix."""
        inner, width, e = self.shape.intermediate_size / self.dims.tp, self.shape.hidden_size, self.compute
        passing = self.tokens * (3 * e * inner + self.residual * width)
        if not self.frozen:
            passing += inner * width * (6 if self.bf16 else 4)
        elif self.beside_mlp:  # one way back through the base, one beside it, which peft casts to fp32
            passing = self.tokens * (12 * inner if self.bf16 else 16 * inner + 4 * width)
        return passing + self.rotary

    @property
    def beside_mlp(self) -> bool:
        return self.frozen and bool(self.trains("gate_proj", "up_proj", "down_proj"))

    @property
    def first_gradients(self) -> float:
        """Of them what is there while all of the block's activations still are."""
        inner, width, e = self.shape.intermediate_size / self.dims.tp, self.shape.hidden_size, self.compute
        passing = 8 * inner + 4 * width if self.beside_mlp else 3 * e * inner + e * width * self.frozen
        return self.tokens * passing + self.rotary

    # --- together -----------------------------------------------------------------------------------------

    def bytes(self) -> dict[str, int]:
        adapters = 4 * self.adapter_numbers / self.fsdp
        gradients = 4 * self.trained_numbers
        found = {
            "weights": self.weights,
            "adapters": adapters,
            "gradients": gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "recomputed": self.recomputed,
            "logits": self.logits,
            "buffers": self.buffers,
            "temporary": self.temporary,
        }
        always = self.weights + adapters + self.optimizer
        before = gradients if self.micro_batches > 1 else 0.0
        full = self.spec.trainer.activation_checkpointing == "full"
        buffers = self.buffers - self._cast * (1 - 1 / self.layers) if full else self.buffers
        passing = self.recomputed + buffers + self.first_gradients
        one = self.block if self.spec.trainer.activation_checkpointing == "none" else 0.0
        moments = {
            "loss": before + self.activations + self.logits + self._cast + self.between,
            "backward of the last block": before + self.activations - self.ends + passing,
            "backward of the first block": gradients + one + self.between + passing,
            "optimizer's step": gradients,
        }
        tensors = always + max(moments.values())
        whole = {name: round(value) for name, value in found.items()}
        runtime = RUNTIME_BYTES if self.device == "cpu" else 0  # a GPU's context is none of its allocator's
        return {
            **whole,
            "tensors": round(tensors),
            "runtime": runtime,
            "peak": round(tensors - self.untouched) + runtime,
        }

    @property
    def _cast(self) -> float:
        """Buffers that are there in the loss too: those that nobody makes anew for each matrix."""
        blocks = [matrix for matrix, _ in self.matrices if matrix.role == "block"]
        return self.buffers - max(self.held(matrix).whole for matrix in blocks) / self.dims.tp


# --- per stage (issue 7) --------------------------------------------------------------------------------------


def ranks(
    spec: ExperimentSpec, device: str = "cpu", world_size: int | None = None
) -> tuple[RankMemory, ...] | None:
    """What the ranks of each pipeline stage hold; None where no closed form is known (`why_unknown` says why).

    Args:
        spec: the experiment, validated.
        device: `cpu` or `cuda`.
        world_size: ranks, where they are others than the cluster section says.
    """
    found = memory(spec, device, world_size)
    if found is None:
        return None
    dims = ParallelDims.fill(spec.parallel, world_size or spec.cluster.world_size)
    whole = {name: found[name] for name in CATEGORIES}
    scale = found["tensors"] / max(1, sum(whole.values()))
    at_peak = {name: int(scale * size) for name, size in whole.items()}
    at_peak["temporary"] += found["tensors"] - sum(at_peak.values())
    return tuple(
        RankMemory(
            stage=stage,
            ranks=dims.world_size // dims.pp,
            bytes=whole,
            at_peak=at_peak,
            tensors=found["tensors"],
            moment="backward",
            allocator=0,
            runtime=found["runtime"],
        )
        for stage in range(dims.pp)
    )


def why_unknown(spec: ExperimentSpec) -> str | None:
    """Why no closed form is known, in words; None where one is."""
    if spec.model.shape is None:
        return "the model's dimensions are told by its weights alone: set model.shape"
    if memory(spec) is None:
        return "no closed form is known for this strategy, optimizer, task or attention"
    return None
