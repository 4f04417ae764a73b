"""What a process holds beside its tensors: libraries, a GPU's context, what allocators keep.

On a CPU: measured on Linux with torch 2.13 (its CPU build), transformers 5.23 and peft 0.21. On a GPU: the context
and the libraries' own buffers lie outside of torch's allocator.
"""

from __future__ import annotations

MIB = 2**20

PROCESS = 440 * MIB
"""Resident memory of a worker beside its tensors: Python, torch for CPUs, transformers, numpy and what they map: 407 to
425 MiB in finished runs (`libraries` in memory.json), and some on top for other versions: what is planned too small
would be said to fit."""
TOKENIZER = 24 * MIB
"""Of a tokenizer with some ten thousand words, where it isn't bytes (444 MiB in all beside SmolLM2-135M)."""
GLOO = 8 * MIB
"""Of a worker in a group: gloo's threads, pairs and their buffers, the store's client, what sharding imports."""
PROFILER = 104 * MIB
"""What torch's profiler takes while it is read, after the steps whose communication is measured: 64 to 104 MiB in three
runs of a version that still counted it. Finished runs leave it out of their peak (hpcdl.worker.metrics.Peak), a node's
memory doesn't."""
CONTEXT = 550 * MIB
"""CUDA's context with torch's kernels loaded: 400 to 550 MiB on A100 and H100 (nvidia-smi less
torch.cuda.memory_reserved; huggingface.co/docs/transformers/model_memory_anatomy tells 1.3 GB of an older one,
kernels of which are loaded lazily since CUDA 11.7)."""
CUBLAS = 32 * MIB + 1 * MIB
"""cuBLAS's workspace on Hopper, 8 MiB elsewhere, within torch's allocator (CUBLAS_WORKSPACE_CONFIG), and cuBLASLt's."""
NCCL = 400 * MIB
"""NCCL's channels: buffers of 4 MiB (NCCL_BUFFSIZE) a channel, peer and protocol, for the rings of some groups."""
FRAGMENTS = 0.04
"""Of a step's tensors, what a GPU's caching allocator reserves beyond them: blocks are rounded up to 2 MiB segments
and split (docs.pytorch.org/docs/stable/notes/cuda.html#memory-management)."""
HOLES, HOLES_OF_ALL = 1.75, 1.0
"""What malloc's heap comes to hold in holes that fit nothing: times what a step makes without gradients, and times
all of it; the larger counts.

Below M_MMAP_THRESHOLD (32 MiB once it has grown) freed memory is kept (mallopt(3)), and pieces of many sizes come and
go in each step. It takes some twenty steps until the process is at its largest: of SmolLM2-135M's LoRA 0.66 GiB for
384 MiB (1.7 times), with all weights trained 0.9 to 1.0 GiB for 944 to 1,147 MiB, of which 513 are gradients (0.9
to 1.0 times).
"""
ARENA = 88 * MIB
"""The same whatever the tensors' size: a tiny model's 35 MiB in 300 steps for 20 MiB, and up to 107 MiB for 19 MiB
where every block is computed again (benchmarks/planner.py, the deep model under LoRA). With 60 MiB three of forty
points drawn by chance, all in bf16, took up to 22 MiB more than was planned (seed 8)."""
MAPPED = 32 * MIB
"""A piece from this size on is given back when it is freed (glibc's highest M_MMAP_THRESHOLD)."""
RESULT = 48 * MIB
"""What the first rank loads at a run's end to leave its card and its plot (matplotlib, and what merges an adapter): a
process without holes to take it in had 25 MiB more than was planned (a pipeline's first stage, DoRA)."""
CHUNKS = 0.02
"""Of what lies there while no step goes on: pieces too small to be given back."""


def context(many: bool) -> int:
    """Bytes on a GPU outside of torch's allocator.

    Args:
        many: whether ranks talk.
    """
    return CONTEXT + (NCCL if many else 0)


def runtime(device: str, *, many: bool, words: bool = False) -> int:
    """Bytes of the process beside tensors and what the allocator keeps.

    Args:
        device: `cpu` or `cuda`.
        many: whether ranks talk.
        words: whether the tokenizer is more than bytes.
    """
    if device == "cuda":
        return context(many)
    return PROCESS + (GLOO if many else 0) + (TOKENIZER if words else 0)


def allocator(
    device: str,
    tensors: float,
    with_inside: float,
    elsewhere: float,
    made: float,
    gradients: float,
    *,
    loaded: float = 0.0,
    tidy: bool = False,
) -> int:
    """Bytes beyond tensors at their peak.

    Args:
        device: `cpu` or `cuda`.
        tensors: of a step, at most.
        with_inside: the same with what operators take for themselves.
        elsewhere: what the process holds at most outside of steps: while it loads, or copies a checkpoint.
        made: of `tensors` those that each step makes anew, in pieces below MAPPED.
        gradients: of these the gradients, and the buckets that they are in.
        loaded: what FSDP lets go of the whole model when it shards it, and its exchanges take: pieces that fit nothing.
        tidy: malloc was told to keep no holes (hpcdl.distributed.allocator).
    """
    if device == "cuda":
        return round(with_inside - tensors + FRAGMENTS * with_inside + CUBLAS)
    holes = CHUNKS * made if tidy else max(HOLES * (made - gradients), HOLES_OF_ALL * made)
    return round(max(with_inside + holes + loaded, (1 + CHUNKS) * elsewhere) - tensors + ARENA)
