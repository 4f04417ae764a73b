"""What is optimised, how, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What the loss is taken over, and which text the result card shows before and after.

    Base class: `hpcdl.tasks.<name>.Config` is what a config becomes.
    """

    name: str
    """The task: the name of a file in hpcdl/tasks/."""
    sample_prompt: str = "The Python statement"
    """Text that the model continues before and after training; empty for none."""
    sample_tokens: Annotated[int, Ge(0)] = 40
    """How many tokens it writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSpec:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    """`adamw` (Loshchilov & Hutter, 2019), the same with its moments in 8 bits, or `sgd` with momentum."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay on matrices; norms and biases are left out."""
    betas: tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's epsilon."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up, down to `min_lr_ratio` at the last step."""
    min_lr_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """Last learning rate as a fraction of the peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSpec:
    """The loop: how many steps of which batch, in which precision, and what is kept."""

    max_steps: Annotated[int, Ge(1)]
    """Optimizer steps."""
    global_batch_size: Annotated[int, Ge(1)]
    """Sequences an optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Ge(1)]
    """Sequences a forward pass of one rank; the rest is gradient accumulation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`fp32`, or `bf16` autocast over fp32 master weights."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute each block in the backward pass (`full`), every second one (`selective`), or nothing."""
    activation_offload: Literal["none", "host", "disk"] = "none"
    """Where inputs of blocks that recompute (`activation_checkpointing=full`) wait for the backward pass: on the
    device (`none`), in the `host`'s memory where that is a GPU, in a file in $TMPDIR (`disk`)."""
    eval_every: Annotated[int, Ge(0)] = 0
    """Steps between evaluations on held-out text; 0: before and after training only."""
    eval_samples: Annotated[int, Ge(1)] = 64
    """Held-out sequences that an evaluation reads at most."""
    log_every: Annotated[int, Ge(1)] = 1
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: Annotated[int, Ge(0)] = 0
    """Steps between checkpoints; 0: at the end and when asked to stop only."""
    checkpoint_async: bool = True
    """Write checkpoints in the background, from a copy in host memory, while training goes on; the last one
    of a run is waited for."""
    keep_last: Annotated[int, Ge(1)] = 2
    """Checkpoints that are kept: the newest ones."""
    keep_best: Annotated[int, Ge(0)] = 0
    """Checkpoints that are kept besides: those with the lowest held-out loss, of steps that are evaluated too
    (`checkpoint_every` is a multiple of `eval_every`)."""
    resume_from: str | None = None
    """Another run whose training this one goes on with, on any number of ranks and under any strategy: as
    asked for a run id, its beginning, `latest`, a run's directory or one of its checkpoints; as recorded the
    absolute path of the checkpoint, its newest whole one at the launch."""
    max_grad_norm: Annotated[float, Gt(0)] | None = 1.0
    """Clip the global gradient norm to this; null for no clipping."""
    compile: bool = False
    """torch.compile each decoder block."""
    threads_per_process: Annotated[int, Ge(0)] = 0
    """CPU threads of a worker; 0: the cores it was given, shared evenly."""
    interop_threads: Annotated[int, Ge(0)] = 0
    """Operations that torch may run side by side in a worker; 0: as many as it has threads."""
    binding: Literal["auto", "none", "cores", "numa"] = "auto"
    """Bind each worker to cores of its own (`cores`), and its memory to their NUMA node (`numa`), or not
    (`none`). `auto`: as `numa` where Slurm gave the job exactly the CPUs that it may use, else `none`."""
