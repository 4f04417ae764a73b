"""Full-parameter training in little memory: weights pass through layer by layer and are updated on the way back.

Weights and the optimizer's state lie in a working file (`device: disk`) or in host memory (`device: host`). A
step goes through the layers three times: forward, keeping the input of each layer alone; backward, where a
layer's forward pass is computed again, its gradient taken over all micro-batches of the step, the optimizer's
step taken at once and the layer written back. No more than one layer's gradient is ever held; of the output head
and the embedding, a few thousand rows. With `trainer.max_grad_norm` the backward pass is made twice: the norm
of the whole gradient must be known before the first layer is changed.

Sources: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), ACL 2024
(the update fused into the backward pass, the second pass for the norm); Rajbhandari et al., "ZeRO-Infinity",
SC 2021 (weights and state on disk); Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.

`weights: bf16` holds and computes weights in bf16, as most checkpoints have them: half the disk and half the
traffic. An update is then computed in fp32 and rounded to one of the two nearest bf16 numbers at random, so
that it is right on average: rounded to the nearest, an update below 2⁻⁹ of its weight would be lost. Source:
Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015; Zamirai et al., "Revisiting BFloat16
Training", 2020. The optimizer's state stays in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, ModelShape, OffloadSpec
from hpcdl.spec.parallel import DIMENSIONS, ParallelDims
from hpcdl.spec.streaming import CHUNK_LOGITS, PIECE, SLICE, UNDER_WAY

STREAMS = True
STATE = {"adamw": 2, "sgd": 1}
"""Numbers of optimizer state a weight, by optimizer; those that can be stepped a few rows at a time."""
TASKS = ("pretrain", "sft")
"""Tasks whose loss is the cross-entropy of the next token and nothing more."""
PROCESS_BYTES = 520 * 2**20
"""A process that has imported torch and transformers and joined its group, as seen on Linux."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(OffloadSpec):
    """Where the weights lie between their turns."""

    device: Literal["disk", "host"] = "disk"
    """`disk`: in a working file; `host`: in the host's memory, page-locked where there is a GPU."""
    folder: str | None = None
    """Folder of the working file, best on a fast disk of the node's own; `~` and `$VARIABLES` are read there.
    Null: the run directory. The file has no name: nothing of it is left behind, however the run ends."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """`fp32`, as in ordinary training; `bf16`: half of everything, updates are rounded at random."""
    activations: Literal["memory", "disk"] = "memory"
    """Where the layers' inputs wait for the backward pass; `disk`: in the working file."""
    read_ahead: bool = True
    """Ask the disk for the next layer while this one computes."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Whole models on every process, every weight trained in the dtype it is held in."""
    if spec.parallel.name != "ddp":
        yield _fault(f"passes whole layers through every process, and parallel={spec.parallel.name} shares them"
                     " out in its own way", "ddp, on one process or several", "parallel=ddp")  # fmt: skip
    else:
        yield from _one_dimension(spec)
    for section, method, why in (
        ("peft", spec.peft.name, "trains a few weights beside a frozen base"),
        ("quant", spec.quant.scheme, "holds weights in a form that takes no updates"),
        ("prune", spec.prune.name, "looks at the whole model at once"),
    ):
        if method != "none":
            yield _fault(f"trains every weight, and {section}={method} {why}", f"{section}=none",
                         f"{section}=none, or offload=none")  # fmt: skip
    if spec.task.name not in TASKS:
        yield _fault(f"computes the loss over slices of the vocabulary, and task={spec.task.name} wants it whole",
                     "task=" + " or ".join(TASKS), "offload=none")  # fmt: skip
    if spec.optim.name not in STATE:
        yield _fault(f"steps a few rows at a time, which optim={spec.optim.name} can't",
                     "optim=" + " or ".join(STATE), "optim=adamw")  # fmt: skip
    if spec.trainer.compile:
        yield _fault("moves weights in and out between layers, which trainer.compile=true can't follow",
                     "trainer.compile=false", "trainer.compile=false")  # fmt: skip
    if config.weights == "bf16" and spec.trainer.precision != "bf16":
        yield Fault(
            key="offload.weights",
            value="bf16",
            problem=f"weights in bf16 are computed with in bf16, and trainer.precision is {spec.trainer.precision}",
            allowed="fp32, or bf16 with trainer.precision=bf16",
            fix="trainer.precision=bf16",
        )
    if config.activations == "disk" and config.device == "host":
        yield Fault(
            key="offload.activations",
            value="disk",
            problem="there is no working file with offload.device=host",
            allowed="memory, or disk with offload.device=disk",
            fix="offload.activations=memory",
        )


def _one_dimension(spec: ExperimentSpec) -> Iterator[Fault]:
    for name in DIMENSIONS:
        degree = getattr(spec.parallel, name)
        if name != "dp_replicate" and degree != 1:
            yield _fault(f"keeps layers and sequences whole, and parallel.{name} is {degree}",
                         f"parallel.{name}=1", f"parallel.{name}=1")  # fmt: skip


def _fault(problem: str, allowed: str, fix: str) -> Fault:
    return Fault(key="offload.name", value="stream", problem=problem, allowed=allowed, fix=fix)


def disk_bytes(config: Config, spec: ExperimentSpec) -> int | None:
    """Bytes of the working file of one process; None where the model's shape isn't known."""
    shape = spec.model.shape
    if shape is None:
        return None
    width = 2 if config.weights == "bf16" else 4
    activations = _inputs(config, spec, shape) if config.activations == "disk" else 0
    return parameters(shape) * (width + 4 * _state(spec)) + activations


def memory(config: Config, spec: ExperimentSpec) -> dict[str, int] | None:
    """Bytes that a process on a CPU holds at its peak, by what they are for; they add up to the peak.

    The highest of three moments counts: a layer on its way back, the head's slices, or a piece's update.
    Closed form; None where the model's shape isn't known.
    """
    shape = spec.model.shape
    if shape is None:
        return None
    width = 2 if config.weights == "bf16" else 4
    compute = 2 if spec.trainer.precision == "bf16" else 4
    hidden = 2 if config.weights == "bf16" else 4
    micro_batches, tokens = _tokens(spec)
    layer = layer_parameters(shape)
    inputs = (
        _inputs(config, spec, shape)
        if config.activations == "memory"
        else 2 * tokens * shape.hidden_size * hidden
    )
    flows = micro_batches * tokens * shape.hidden_size * hidden
    # Under autocast the layer's weights are there a second time, in bf16; fp32 sums beside bf16 gradients.
    casts = layer * 2 if compute < width else 0
    sums = layer * 4 if width == 2 and micro_batches > 1 else 0
    # Under way to the file, and in the optimizer's hands with what its rounding takes.
    piece = min(PIECE, largest(shape)) * (UNDER_WAY * 4 + 4 * (6 + _state(spec)))
    block = {
        "weights": layer * width + casts,
        "gradients": layer * width + sums,
        "optimizer": piece,
        "activations": inputs + flows + tokens * _inside(shape) * compute,
        "logits": 0,
    }
    rows = min(shape.vocab_size, max(1, SLICE // shape.hidden_size))
    head = {
        "weights": rows * shape.hidden_size * (width + (compute if compute != width else 0)),
        "gradients": rows * shape.hidden_size * 4,
        "optimizer": piece,
        "activations": inputs + micro_batches * tokens * shape.hidden_size * (2 * compute + 4),
        "logits": 2 * min(CHUNK_LOGITS, micro_batches * tokens * rows) * 4,
    }
    most = max((block, head), key=lambda part: sum(part.values()))
    if config.device == "host":
        most["weights"] += parameters(shape) * width
        most["optimizer"] += parameters(shape) * 4 * _state(spec)
    return {**most, "process": PROCESS_BYTES}


def _state(spec: ExperimentSpec) -> int:
    """Numbers of optimizer state a weight."""
    return STATE.get(spec.optim.name, 0) if spec.optim.name != "sgd" or spec.optim.momentum else 0


def _tokens(spec: ExperimentSpec) -> tuple[int, int]:
    """Micro-batches of a process and step, and tokens of each."""
    dims = ParallelDims.possible(spec.parallel, spec.cluster.world_size)
    ranks = dims.data_ranks if dims else 1
    trainer = spec.trainer
    micro_batches = max(1, trainer.global_batch_size // (trainer.micro_batch_size * max(1, ranks)))
    return micro_batches, trainer.micro_batch_size * spec.data.seq_len


def _inputs(config: Config, spec: ExperimentSpec, shape: ModelShape) -> int:
    """Bytes of every layer's input, and the last one's output, of all micro-batches."""
    micro_batches, tokens = _tokens(spec)
    hidden = 2 if config.weights == "bf16" else 4
    return (shape.num_hidden_layers + 1) * micro_batches * tokens * shape.hidden_size * hidden


def _inside(shape: ModelShape) -> int:
    """Numbers a token that one layer keeps for its backward pass, and their gradients on the way."""
    head = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    heads = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * head
    return 8 * shape.hidden_size + 3 * heads + 6 * shape.intermediate_size


def layer_parameters(shape: ModelShape) -> int:
    """Weights of one decoder layer."""
    head = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    attention = 2 * shape.hidden_size * head * (shape.num_attention_heads + shape.num_key_value_heads)
    return attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size


def largest(shape: ModelShape) -> int:
    """Weights of the largest matrix."""
    return shape.hidden_size * max(shape.intermediate_size, shape.vocab_size)


def parameters(shape: ModelShape) -> int:
    """Weights of the whole model; a tied head once."""
    tables = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size
    return shape.num_hidden_layers * layer_parameters(shape) + tables + shape.hidden_size
