"""Training setups that others have published: what was run, how its program goes about a step, what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

# --- models -----------------------------------------------------------------------------------------------

LLAMA3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 262144, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_70B = LLAMA3_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
LLAMA3_405B = LLAMA3_8B | {
    "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
}  # fmt: skip
LLAMA2_7B = LLAMA3_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
LLAMA2_13B = LLAMA2_7B | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Program:
    """How a published program goes about a step, where it differs from hpcdl: read in its code."""

    recompute: Literal["op", "full", "none"]
    """`op`: torchtitan's selective checkpointing, which keeps every second matrix product and attention's result."""
    compiled: bool
    """Blocks are fused: what norms and rotary embedding make in fp32 isn't kept."""
    logit_bytes: float = 12.0
    """Of a logit at the loss's highest moment. 12: log-softmax, its gradient and the logits' in fp32, all of them at
    once (torch's cross_entropy after `.float()`); 16: torch's loss_parallel (_nll_loss_and_log_softmax_backward: the
    log-softmax, its exponential, the targets' gradient and the sum); 4: logits and gradient in bf16 (compiled)."""
    loss_in_chunks: int = 1
    """Parts in which the loss is taken; logits in bf16 are there whole (torchtune's CEWithChunkedOutputLoss)."""
    micro_batches: int = 1
    """A step's, in a pipeline: torchtitan's default is as many as ranks (build_pipeline_schedule)."""
    stages_per_rank: int = 1
    """Of a pipeline."""
    reserved: float = 1.12
    """What torch's caching allocator has reserved, which is what is published, over what tensors take: 10.22 over 9.16
    GiB in fsdp_qlora's benchmarks_03_2024.md."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published measurement."""

    what: str
    """The setup, for the table."""
    shape: dict[str, Any]
    gpu: str
    """As hpcdl.plan.devices names it, or one of OWN."""
    ranks: int
    program: Program
    seq: int
    sequences: int
    """Of a data-parallel rank's step."""
    degrees: tuple[int, int, int, int] = (1, 1, 1, 1)
    """dp_shard, cp, tp, pp; dp_shard 1: one copy on each rank (DDP)."""
    gib: float | None = None
    """Published peak of a GPU."""
    tokens_per_s: float | None = None
    """Published, of a GPU."""
    timed: bool = True
    """Whether the plan has the precision that it ran in."""
    lora: dict[str, Any] | None = None
    """peft's keys."""
    quant: dict[str, Any] | None = None
    """quant's keys."""
    schedule: str = "1f1b"
    accumulate: int = 1
    """Micro-batches of a rank's step without a pipeline."""
    source: str = ""
    beyond: str = ""
    """What its number has that a step's plan can't: then it isn't held against it."""


TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_H200 = "torchtitan, benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md"
TITAN_A100 = "torchtitan, docs/performance.md (64 A100, 2024)"
TUNE = "torchtune, README.md (0031bfb)"
QLORA = "fsdp_qlora, benchmarks_03_2024.md"
AUTOMODEL = "NeMo AutoModel, performance summary, 2026"

EAGER, COMPILED = Program(recompute="op", compiled=False), Program(recompute="op", compiled=True)
FULL = Program(recompute="full", compiled=True)
TP_FULL = replace(FULL, logit_bytes=16.0)
PIPELINE = replace(TP_FULL, micro_batches=8)
FUSED_LOSS = replace(COMPILED, logit_bytes=4.0)
TUNED = Program(recompute="full", compiled=True, logit_bytes=4.0, loss_in_chunks=8, reserved=1.0)
HF = Program(recompute="full", compiled=False, logit_bytes=18.0)
"""transformers' Llama with labels: logits in bf16 and fp32 and their shifted copy stay beside cross_entropy's."""

WRAPPED = "3.72 GiB were reserved before its first step, by loading (its authors)"

SAC = "selective (op)"
H100S = "H100 500W"


def titan(what: str, ranks: int, program: Program, **keys: Any) -> Row:
    """A row of torchtitan's table of December 2024: 8k tokens, two sequences a GPU where nothing else is said."""
    plain: dict[str, Any] = {"shape": LLAMA3_8B, "gpu": H100S, "seq": 8192, "sequences": 2, "source": TITAN}
    return Row(what=what, ranks=ranks, program=program, **(plain | keys))


FP8 = ", float8"
ROWS = (
    titan(f"8B, FSDP 8, {SAC}", 8, EAGER, degrees=(8, 1, 1, 1), gib=82.4, tokens_per_s=5762),
    titan(f"8B, FSDP 8, {SAC}, compile", 8, COMPILED, degrees=(8, 1, 1, 1), gib=77.0, tokens_per_s=6667),
    titan(f"8B, FSDP 8, {SAC}, compile{FP8}", 8, COMPILED, degrees=(8, 1, 1, 1), gib=76.8, tokens_per_s=8532,
          timed=False),
    titan(f"8B, FSDP 128, {SAC}", 128, EAGER, degrees=(128, 1, 1, 1), gib=67.0, tokens_per_s=5605),
    titan(f"8B, FSDP 128, {SAC}, compile", 128, COMPILED, degrees=(128, 1, 1, 1), gib=62.0, tokens_per_s=6514),
    titan(f"8B, FSDP 128, {SAC}, compile{FP8}", 128, COMPILED, degrees=(128, 1, 1, 1), gib=61.8, tokens_per_s=8380,
          timed=False),
    *(
        titan(f"8B, FSDP {8 // cp} × CP {cp}, {32 * cp}k tokens, full, compile{FP8}", 8, FULL, seq=32768 * cp,
              degrees=(8 // cp, cp, 1, 1), sequences=1, gib=gib, tokens_per_s=speed, timed=False)
        for cp, gib, speed in ((1, 83.9, 3890), (2, 84.2, 2540), (4, 84.0, 1071), (8, 84.5, 548))
    ),
    titan(f"70B, FSDP 32 × TP 8, full, compile{FP8}", 256, TP_FULL, shape=LLAMA3_70B, degrees=(32, 1, 8, 1),
          sequences=16, gib=71.9, tokens_per_s=829, timed=False),
    titan(f"70B, the same with AsyncTP{FP8}", 256, TP_FULL, shape=LLAMA3_70B, degrees=(32, 1, 8, 1),
          sequences=16, gib=67.6, tokens_per_s=876, timed=False),
    titan(f"405B, FSDP 8 × TP 8 × PP 8 (1F1B), full, compile{FP8}", 512, PIPELINE, shape=LLAMA3_405B,
          degrees=(8, 1, 8, 8), sequences=32, gib=82.5, tokens_per_s=100, timed=False),
    titan(f"405B, the same, interleaved 1F1B{FP8}", 512, replace(PIPELINE, stages_per_rank=2), shape=LLAMA3_405B,
          degrees=(8, 1, 8, 8), sequences=32, schedule="interleaved_1f1b", gib=72.7, tokens_per_s=128, timed=False),
    *(
        titan(f"405B, FSDP {8 // cp} × CP {cp} × TP 8 × PP 8, {32 * cp}k tokens{FP8}", 512, PIPELINE, shape=LLAMA3_405B,
              degrees=(8 // cp, cp, 8, 8), seq=32768 * cp, sequences=8, gib=gib, tokens_per_s=speed, timed=False)
        for cp, gib, speed in ((1, 75.3, 76), (2, 75.9, 47), (4, 77.1, 31), (8, 84.9, 16))
    ),
    *(
        titan(f"8B, FSDP {ranks}, {SAC}, compile{FP8}", ranks, FUSED_LOSS, gpu="H200", degrees=(ranks, 1, 1, 1),
              gib=gib, tokens_per_s=speed, timed=False, source=TITAN_H200)
        for ranks, gib, speed in ((32, 47.96, 10938), (64, 46.97, 10753))
    ),
    titan(f"8B, FSDP 64, {SAC}", 64, COMPILED, gpu="A100 80GB", degrees=(64, 1, 1, 1), sequences=1, tokens_per_s=2973,
          source=TITAN_A100),
    titan("70B, FSDP 64, full", 64, FULL, gpu="A100 80GB", shape=LLAMA3_70B, degrees=(64, 1, 1, 1), sequences=1,
          tokens_per_s=331, source=TITAN_A100),
    titan("Llama-2 13B, FSDP 64, nothing recomputed", 64, replace(COMPILED, recompute="none"), gpu="A100 80GB",
          shape=LLAMA2_13B, seq=4096, degrees=(64, 1, 1, 1), tokens_per_s=2162, source=TITAN_A100),
    titan("405B, FSDP 16 × TP 8, full", 128, FULL, shape=LLAMA3_405B, degrees=(16, 1, 8, 1), tokens_per_s=109,
          source="torchtitan, docs/performance.md (128 H100, 2024)"),
    Row(what="70B, FSDP 32 × CP 2, full", shape=LLAMA3_70B, gpu="H100", ranks=64, program=FULL, seq=8192, sequences=4,
        accumulate=4, degrees=(32, 2, 1, 1), tokens_per_s=866.77, source=AUTOMODEL),
    Row(what="8B, LoRA, one GPU", shape=LLAMA3_8B, gpu="H100", ranks=1, program=FULL, seq=4096, sequences=32,
        accumulate=16, lora={"rank": 16, "targets": ["q_proj", "v_proj"]}, tokens_per_s=12472.87, source=AUTOMODEL),
    Row(what="8B, QLoRA rank 8, compile", shape=LLAMA3_8B, gpu="RTX 4090", ranks=1, program=TUNED, seq=2048,
        sequences=2, lora={"rank": 8, "targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        quant={"scheme": "nf4"}, gib=7.4, tokens_per_s=2413, source=TUNE),
    *(
        Row(what=f"Llama-2 7B, QLoRA rank 64, FSDP 2, {size} × {seq} tokens", shape=LLAMA2_7B, gpu="RTX 4090", ranks=2,
            program=HF, seq=seq, sequences=size, degrees=(2, 1, 1, 1), quant={"scheme": "nf4"}, gib=gib,
            lora={"rank": 64, "targets": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]},
            tokens_per_s=speed, source=QLORA, beyond=WRAPPED if seq == 512 else "")
        for size, seq, gib, speed in ((1, 512, 4.98, None), (1, 2048, 5.21, None), (4, 2048, 11.22, None),
                                      (10, 2048, 20.97, 1024 * 2048 / 466 / 2))
    ),
)  # fmt: skip
